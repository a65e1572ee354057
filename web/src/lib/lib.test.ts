import { describe, expect, test } from "vitest";
import { withQuery } from "../api/client";
import { pauseBefore } from "./backoff";
import { ago, bytes, cores, count, share, span } from "./format";
import { Lines } from "./lines";
import { isOver, stations, tone } from "./phases";

describe("format", () => {
  test("bytes have one unit and no false precision", () => {
    expect([0, 1023, 1024, 1536, 134_217_728, 1_610_612_736].map(bytes)).toEqual(["0 B", "1023 B", "1 KiB", "1.5 KiB", "128 MiB", "1.5 GiB"]);
  });
  test("cores, counts, shares", () => {
    expect([1, 0.5, 0.01].map(cores)).toEqual(["1 core", "0.5 cores", "0.01 cores"]);
    expect(count(1, "copy", "copies")).toBe("1 copy");
    expect(count(12_000, "copy", "copies")).toBe("12,000 copies");
    expect([share(1, 2), share(3, 2), share(1, 0)]).toEqual([0.5, 1, 0]);
  });
  test("times", () => {
    expect([0, 59_000, 60_000, 3_600_000, 86_400_000 * 3].map(span)).toEqual(["0 s", "59 s", "1 min", "1 h", "3 d"]);
    expect(ago(1000, 1500)).toBe("just now");
    expect(ago("1970-01-01T00:00:00Z", 120_000)).toBe("2 min ago");
  });
});

test("lines come whole however the bytes are cut, also within a character", () => {
  const bytes = new TextEncoder().encode('{"text":"größe"}\n\n{"n":2}\n{"half');
  for (let cut = 0; cut <= bytes.length; cut++) {
    const lines = new Lines();
    expect([...lines.push(bytes.slice(0, cut)), ...lines.push(bytes.slice(cut))]).toEqual(['{"text":"größe"}', "", '{"n":2}']);
  }
});

test("pauses grow, are scattered, and end", () => {
  expect([1, 2, 3].map((n) => pauseBefore(n, 1))).toEqual([500, 1000, 2000]);
  expect(pauseBefore(50, 1)).toBe(10_000);
  expect(pauseBefore(5, 0)).toBe(0);
});

test("a query leaves out what is not set", () => {
  expect(withQuery("/v1/x", { a: 1, b: undefined, c: "", d: "ä b" })).toBe("/v1/x?a=1&d=%C3%A4+b");
  expect(withQuery("/v1/x")).toBe("/v1/x");
});

describe("phases", () => {
  test("every phase has a tone, and an unknown one is calm", () => {
    expect(["ready", "degraded", "baking", "no-such"].map(tone)).toEqual(["good", "bad", "busy", "idle"]);
  });
  test("the rail knows what is past", () => {
    expect(stations("health").map((s) => s.state)).toEqual(["past", "past", "past", "now", "ahead", "ahead", "ahead", "ahead"]);
    expect(stations("done").every((s) => s.state === "past")).toBe(true);
    expect(isOver("rolled_back") && !isOver("rolling_back")).toBe(true);
  });
});
