//! Reading output as it lies on disk and while it is written.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::io::Write;

use super::*;

fn write(dir: &Path, attempt: u32, number: u64, lines: std::ops::Range<u64>) {
    let dir = dir.join(attempt.to_string());
    fs::create_dir_all(&dir).unwrap();
    let text: String = lines.map(|n| format!("{n} O line {n}\n")).collect();
    fs::write(dir.join(format!("log.{number}")), text).unwrap();
}

fn all(reader: &mut Reader) -> Vec<String> {
    let mut texts = Vec::new();
    loop {
        let lines = reader.next_chunk().unwrap();
        if lines.is_empty() {
            return texts;
        }
        assert!(lines.len() <= CHUNK_LINES_MAX && lines.iter().map(|l| l.text.len()).sum::<usize>() <= CHUNK_BYTES_MAX);
        texts.extend(lines.into_iter().map(|l| l.text));
    }
}

#[test]
fn attempts_and_segments_come_in_the_order_they_were_written() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), 2, 9, 30..32);
    write(dir.path(), 2, 10, 32..33); // 10 after 9, not after 1
    write(dir.path(), 1, 1, 10..12);
    let got = all(&mut Reader::new(dir.path(), None, None).unwrap());
    assert_eq!(got, ["line 10", "line 11", "line 30", "line 31", "line 32"]);
}

#[test]
fn the_tail_reaches_over_segments_and_attempts() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), 1, 1, 0..5000);
    write(dir.path(), 1, 2, 5000..5003);
    write(dir.path(), 2, 1, 6000..6002);
    for (tail, first, count) in [(0, None, 0), (1, Some("line 6001"), 1), (3, Some("line 5002"), 3), (4000, Some("line 1005"), 4000)] {
        let got = all(&mut Reader::new(dir.path(), None, Some(tail)).unwrap());
        assert_eq!((got.first().map(String::as_str), got.len()), (first, count), "tail {tail}");
    }
    assert_eq!(all(&mut Reader::new(dir.path(), None, Some(99_999)).unwrap()).len(), 5005);
}

#[test]
fn since_leaves_out_what_came_before() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), 1, 1, 0..10);
    assert_eq!(all(&mut Reader::new(dir.path(), Some(Timestamp(8)), None).unwrap()), ["line 8", "line 9"]);
}

#[test]
fn a_damaged_file_is_read_as_far_as_it_goes() {
    let dir = tempfile::tempdir().unwrap();
    let run = dir.path().join("1");
    fs::create_dir_all(&run).unwrap();
    let mut bytes = b"7 O fine\n\nnonsense\n9 X what\n8 E \xff\xfe\n10 O ".to_vec();
    bytes.extend(vec![b'y'; 100_000]);
    bytes.extend(b"\n11 E torn");
    fs::write(run.join("log.1"), bytes).unwrap();
    fs::write(run.join("log.x"), "not one of ours\n").unwrap();
    let mut reader = Reader::new(dir.path(), None, None).unwrap();
    let got = all(&mut reader);
    assert_eq!(got[..4], ["fine", "nonsense", "9 X what", "\u{fffd}\u{fffd}"]);
    assert!(got[4].len() < LINE_MAX);
    let torn = LogLine { at: Timestamp(11), stderr: true, text: "torn".into() };
    assert_eq!(reader.rest(), Some(torn));
    let last = last_lines(dir.path(), 1).unwrap();
    assert!(last.iter().all(|l| l.len() <= TEXT_MAX));
    assert_eq!(last.last().unwrap(), "torn");
}

#[test]
fn last_lines_are_bounded_and_of_one_attempt() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), 1, 1, 0..100);
    write(dir.path(), 2, 1, 100..110);
    write(dir.path(), 2, 2, 110..115);
    assert_eq!(last_lines(dir.path(), 2).unwrap().len(), 15);
    assert_eq!(last_lines(dir.path(), 2).unwrap()[0], "line 100");
    assert_eq!(last_lines(dir.path(), 1).unwrap().len(), LAST_LINES_MAX);
    assert!(last_lines(dir.path(), 9).unwrap().is_empty());
}

#[test]
fn a_reader_goes_on_over_a_rotation_and_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), 1, 1, 0..2);
    let mut reader = Reader::new(dir.path(), None, None).unwrap();
    assert_eq!(all(&mut reader), ["line 0", "line 1"]);
    let mut file = fs::OpenOptions::new().append(true).open(dir.path().join("1/log.1")).unwrap();
    write!(file, "2 O li").unwrap();
    assert!(all(&mut reader).is_empty(), "half a line");
    writeln!(file, "ne 2").unwrap();
    write(dir.path(), 1, 2, 3..4);
    fs::remove_file(dir.path().join("1/log.1")).unwrap(); // rotated away while it is read
    write(dir.path(), 2, 1, 4..5);
    assert_eq!(all(&mut reader), ["line 2", "line 3", "line 4"]);
}
