"""Takes more and more memory until it is killed."""

import time

STEP = 4 << 20

held = []
while True:
    # Written to, or the kernel would not hand it out.
    held.append(bytearray(b"x" * STEP))
    print(f"holding {len(held) * STEP >> 20} MiB", flush=True)
    time.sleep(0.1)
