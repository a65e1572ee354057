//! Some minutes of one subject's rows, a column a metric, in few bytes.
//!
//! ```text
//!   version u8 | rows u16 | columns u8 | first time u64 (ms) | id u8, a column | bits | crc32
//!   bits: second differences of the times (in tenths of a second), then of each column the first code and the differences
//! ```
//!
//! Numbers that hardly change cost a bit or two, those that do not change nothing (see [`super::bits`]). The idea is
//! that of Gorilla (Pelkonen et al., VLDB 2015), with codes in place of floats and Rice's code in place of fixed windows.

use optimus_common::Timestamp;

use super::Metric;
use super::bits::{Code, Malformed, Reader, Writer, put_signed, take_signed};

const VERSION: u8 = 1;
/// Most rows of a chunk: five minutes at a second each.
pub const ROWS_MAX: usize = 300;
/// Times are kept to a tenth of a second.
const TICK_MS: u64 = 100;
const HEAD: usize = 12;

/// All figures of one subject at one time; [`Code::NONE`] where there is none.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    pub at: Timestamp,
    /// In the order of [`Metric::ALL`].
    pub codes: Vec<Code>,
}

impl Row {
    pub fn empty(at: Timestamp) -> Row {
        Row { at, codes: vec![Code::NONE; Metric::ALL.len()] }
    }
    pub fn set(&mut self, metric: Metric, value: u64) {
        if let Some(place) = place(metric) {
            self.codes[place] = Code::of(value);
        }
    }
    pub fn get(&self, metric: Metric) -> Option<u64> {
        self.codes.get(place(metric)?)?.value()
    }
}

fn place(metric: Metric) -> Option<usize> {
    Metric::ALL.iter().position(|m| *m == metric)
}

/// Why bytes are no chunk.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ChunkError {
    #[error("chunk of version {0}, this build reads {VERSION}")]
    Version(u8),
    #[error("chunk of {0} bytes is too short")]
    Short(usize),
    #[error("checksum mismatch: stored {stored:08x}, computed {computed:08x}")]
    Checksum { stored: u32, computed: u32 },
    #[error("malformed chunk")]
    Malformed,
}

impl From<Malformed> for ChunkError {
    fn from(_: Malformed) -> Self {
        ChunkError::Malformed
    }
}

/// Encodes rows in the order of their times, at most [`ROWS_MAX`]; more are not looked at.
pub fn seal(rows: &[Row]) -> Vec<u8> {
    let rows = &rows[..rows.len().min(ROWS_MAX)];
    let columns: Vec<usize> = (0..Metric::ALL.len()).filter(|c| rows.iter().any(|r| r.codes[*c] != Code::NONE)).collect();
    let first = rows.first().map_or(0, |r| r.at.0);
    let mut out = vec![VERSION];
    out.extend((rows.len() as u16).to_le_bytes());
    out.push(columns.len() as u8);
    out.extend(first.to_le_bytes());
    out.extend(columns.iter().map(|c| Metric::ALL[*c] as u8));
    let mut bits = Writer::default();
    let ticks: Vec<i64> = rows.iter().map(|r| ((r.at.0.saturating_sub(first) + TICK_MS / 2) / TICK_MS) as i64).collect();
    let steps: Vec<i64> = std::iter::once(0).chain(ticks.windows(2).map(|w| w[1] - w[0])).collect();
    put_signed(&mut bits, &steps.windows(2).map(|w| clamp(w[1] - w[0])).collect::<Vec<_>>());
    for column in columns {
        let codes: Vec<i32> = rows.iter().map(|r| i32::from(r.codes[column].0)).collect();
        bits.put(codes.first().map_or(0, |c| *c as u32), 16);
        put_signed(&mut bits, &codes.windows(2).map(|w| w[1] - w[0]).collect::<Vec<_>>());
    }
    out.extend(bits.finish());
    let sum = crc32fast::hash(&out);
    out.extend(sum.to_le_bytes());
    out
}

/// A step of more than years is none of ours.
fn clamp(n: i64) -> i32 {
    n.clamp(i64::from(i32::MIN / 2), i64::from(i32::MAX / 2)) as i32
}

/// Decodes what [`seal`] made. Metrics this build does not know are left out.
pub fn open(bytes: &[u8]) -> Result<Vec<Row>, ChunkError> {
    let Some((body, sum)) = bytes.split_last_chunk::<4>().filter(|(body, _)| body.len() >= HEAD) else {
        return Err(ChunkError::Short(bytes.len()));
    };
    let (stored, computed) = (u32::from_le_bytes(*sum), crc32fast::hash(body));
    if stored != computed {
        return Err(ChunkError::Checksum { stored, computed });
    }
    let (head, rest) = body.split_at(HEAD);
    if head[0] != VERSION {
        return Err(ChunkError::Version(head[0]));
    }
    let (count, columns) = (usize::from(u16::from_le_bytes([head[1], head[2]])), usize::from(head[3]));
    if count > ROWS_MAX || rest.len() < columns {
        return Err(ChunkError::Malformed);
    }
    let mut first = [0; 8];
    first.copy_from_slice(&head[4..HEAD]);
    let first = u64::from_le_bytes(first);
    let (ids, rest) = rest.split_at(columns);
    let mut bits = Reader::new(rest);
    let mut rows = Vec::with_capacity(count);
    let (mut at, mut step) = (0i64, 0i64);
    for (n, second) in std::iter::once(0).chain(take_signed(&mut bits, count.saturating_sub(1))?).take(count).enumerate() {
        if n > 0 {
            step += i64::from(second);
            at += step;
        }
        let ms = u64::try_from(at).map_err(|_| ChunkError::Malformed)?.saturating_mul(TICK_MS);
        rows.push(Row::empty(Timestamp(first.saturating_add(ms))));
    }
    for id in ids {
        let mut code = bits.take(16)? as i32;
        let place = Metric::from_id(*id).and_then(place);
        let steps = take_signed(&mut bits, count.saturating_sub(1))?;
        for (row, step) in rows.iter_mut().zip(std::iter::once(0).chain(steps)) {
            code = code.checked_add(step).ok_or(ChunkError::Malformed)?;
            let code = u16::try_from(code).ok().filter(|c| *c <= Code::MAX.0).ok_or(ChunkError::Malformed)?;
            if let Some(place) = place {
                row.codes[place] = Code(code);
            }
        }
    }
    Ok(rows)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const START: u64 = 1_800_000_000_000;

    fn rows(count: usize, value: impl Fn(usize, Metric) -> Option<u64>) -> Vec<Row> {
        let row = |n: usize| {
            let mut row = Row::empty(Timestamp(START + n as u64 * 1000));
            for metric in Metric::ALL {
                if let Some(value) = value(n, *metric) {
                    row.set(*metric, value);
                }
            }
            row
        };
        (0..count).map(row).collect()
    }

    /// A web process at work: noise in CPU, memory and traffic, rest elsewhere.
    fn busy(n: usize, metric: Metric) -> Option<u64> {
        let noise = |share: u64| blake3_noise(n as u64, metric as u64) % (share + 1);
        Some(match metric {
            Metric::Cpu => 200 + noise(60),
            Metric::CpuThrottled => 0,
            Metric::MemoryWorking => 180_000_000 + noise(4_000_000),
            Metric::Memory => 230_000_000 + noise(4_000_000),
            Metric::MemoryPeak => 260_000_000,
            Metric::OomKills => 0,
            Metric::Pids => 12,
            Metric::Fds => 40 + noise(8),
            Metric::IoRead => 0,
            Metric::IoWrite => {
                if n.is_multiple_of(10) {
                    8192
                } else {
                    0
                }
            }
            Metric::NetReceive => 90_000 + noise(30_000),
            Metric::NetTransmit => 900_000 + noise(300_000),
            Metric::PressureCpu => noise(9),
            Metric::PressureMemory | Metric::PressureIo => 0,
            _ => return None,
        })
    }

    fn blake3_noise(a: u64, b: u64) -> u64 {
        let mut x = a.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ b.wrapping_mul(0xD1B5_4A32_D192_ED03);
        x ^= x >> 29;
        x = x.wrapping_mul(0xBF58_476D_1CE4_E5B9);
        x ^ (x >> 32)
    }

    #[test]
    fn five_minutes_of_a_busy_process_cost_less_than_0_8_bytes_a_sample() {
        let rows = rows(ROWS_MAX, busy);
        let bytes = seal(&rows);
        let samples = rows.iter().flat_map(|r| &r.codes).filter(|c| **c != Code::NONE).count();
        assert!(bytes.len() as f64 <= 0.8 * samples as f64, "{} bytes for {samples} samples", bytes.len());
        assert_eq!(open(&bytes).unwrap(), rows);
    }

    #[test]
    fn a_process_at_rest_costs_next_to_nothing() {
        let rows = rows(ROWS_MAX, |_, metric| Some(u64::from(metric as u8) * 1000));
        assert!(seal(&rows).len() < 200, "{} bytes", seal(&rows).len());
    }

    #[test]
    fn a_chunk_of_nothing_and_of_one() {
        assert_eq!(open(&seal(&[])).unwrap(), []);
        let one = rows(1, busy);
        assert_eq!(open(&seal(&one)).unwrap(), one);
    }

    #[test]
    fn every_flipped_bit_is_noticed() {
        let bytes = seal(&rows(20, busy));
        for bit in 0..bytes.len() * 8 {
            let mut bad = bytes.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(matches!(open(&bad), Err(ChunkError::Checksum { .. })), "bit {bit}");
        }
    }

    proptest! {
        #[test]
        fn any_rows_come_back(
            start in 0u64..4_000_000_000_000,
            rows in prop::collection::vec((0u64..100_000, prop::collection::vec(0u16..=Code::MAX.0, Metric::ALL.len())), 0..ROWS_MAX),
        ) {
            let mut at = start;
            let rows: Vec<Row> = rows.into_iter().map(|(step, codes)| {
                at += step * TICK_MS;
                Row { at: Timestamp(at), codes: codes.into_iter().map(Code).collect() }
            }).collect();
            prop_assert_eq!(open(&seal(&rows)).unwrap(), rows);
        }

        #[test]
        fn bytes_with_a_good_checksum_are_read_or_refused(mut bytes in prop::collection::vec(any::<u8>(), 12..300)) {
            bytes[0] = VERSION;
            let sum = crc32fast::hash(&bytes);
            bytes.extend(sum.to_le_bytes());
            let _ = open(&bytes);
        }
    }
}
