//! Numbers of a few bits each, and the code for values of three significant digits.

use std::fmt;

/// A value with three significant digits as a number that grows with it: equal steps are equal ratios, within a
/// factor of ten. Zero stands for "no value".
///
/// Values below 1000 are exact; above, the error is at most 0.5 %.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Code(pub u16);

/// Codes below this one (less one) are the value itself.
const EXACT: u64 = 1000;
/// Codes of a power of ten: 100 to 999.
const DECADE: u64 = 900;

impl Code {
    pub const NONE: Code = Code(0);
    /// The largest there is.
    pub const MAX: Code = Code((1 + EXACT + 17 * DECADE) as u16);

    pub fn of(value: u64) -> Code {
        if value < EXACT {
            return Code(1 + value as u16);
        }
        let mut exponent = value.ilog10() - 2;
        let power = 10u64.pow(exponent);
        let mut mantissa = value / power + u64::from(value % power >= power - power / 2);
        if mantissa == 1000 {
            (mantissa, exponent) = (100, exponent + 1);
        }
        let code = 1 + EXACT + u64::from(exponent - 1) * DECADE + (mantissa - 100);
        Code((code as u16).min(Code::MAX.0))
    }

    pub fn value(self) -> Option<u64> {
        let code = u64::from(self.0).checked_sub(1)?;
        let Some(above) = code.checked_sub(EXACT) else { return Some(code) };
        let (exponent, mantissa) = (above / DECADE + 1, above % DECADE + 100);
        Some(mantissa.saturating_mul(10u64.saturating_pow(exponent as u32)))
    }
}

impl fmt::Debug for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.value() {
            Some(value) => write!(f, "~{value}"),
            None => f.write_str("none"),
        }
    }
}

/// Small numbers are short: 0, -1, 1, -2 ... become 0, 1, 2, 3 ...
pub fn zigzag(n: i32) -> u32 {
    ((n << 1) ^ (n >> 31)) as u32
}
pub fn unzigzag(n: u32) -> i32 {
    ((n >> 1) as i32) ^ -((n & 1) as i32)
}

/// Bits, first the highest of each byte.
#[derive(Debug, Default)]
pub struct Writer {
    bytes: Vec<u8>,
    /// Bits not yet in `bytes`, at the low end.
    pending: u64,
    count: u32,
}

impl Writer {
    /// The low `bits` (at most 32) of `value`.
    pub fn put(&mut self, value: u32, bits: u32) {
        let mask = (1u64 << bits) - 1;
        self.pending = (self.pending << bits) | (u64::from(value) & mask);
        self.count += bits;
        while self.count >= 8 {
            self.count -= 8;
            self.bytes.push((self.pending >> self.count) as u8);
        }
    }

    /// The rest of the last byte is zero.
    pub fn finish(mut self) -> Vec<u8> {
        if self.count > 0 {
            self.put(0, 8 - self.count);
        }
        self.bytes
    }
}

/// The bytes ended in the middle of a number, or a number makes no sense.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Malformed;

#[derive(Debug)]
pub struct Reader<'a> {
    bytes: &'a [u8],
    /// Bits read so far.
    at: usize,
}

impl<'a> Reader<'a> {
    pub fn new(bytes: &'a [u8]) -> Self {
        Reader { bytes, at: 0 }
    }

    pub fn take(&mut self, bits: u32) -> Result<u32, Malformed> {
        let mut value = 0;
        for _ in 0..bits {
            let byte = self.bytes.get(self.at / 8).ok_or(Malformed)?;
            value = (value << 1) | u32::from((byte >> (7 - self.at % 8)) & 1);
            self.at += 1;
        }
        Ok(value)
    }
}

/// Numbers that share one parameter: the parameter follows how far they spread.
const BLOCK: usize = 32;
/// Parameter of a block of zeros.
const ALL_ZERO: u32 = 15;
/// Longest run of ones; a number beyond is written as it is.
const UNARY_MAX: u32 = 16;

/// Rice code (Rice and Plaunt, 1971) of zigzag numbers below 2^18, a parameter of four bits a block.
pub fn put_signed(out: &mut Writer, numbers: &[i32]) {
    for block in numbers.chunks(BLOCK) {
        let unsigned: Vec<u32> = block.iter().map(|n| zigzag(*n)).collect();
        if unsigned.iter().all(|n| *n == 0) {
            out.put(ALL_ZERO, 4);
            continue;
        }
        let cost = |k: u32| -> u32 { unsigned.iter().map(|n| if n >> k < UNARY_MAX { (n >> k) + 1 + k } else { UNARY_MAX + RAW }).sum() };
        let k = (0..ALL_ZERO).min_by_key(|k| cost(*k)).unwrap_or(0);
        out.put(k, 4);
        for n in unsigned {
            let ones = n >> k;
            if ones < UNARY_MAX {
                out.put((1 << (ones + 1)) - 2, ones + 1);
                out.put(n, k);
            } else {
                out.put((1 << UNARY_MAX) - 1, UNARY_MAX);
                out.put(n, RAW);
            }
        }
    }
}

/// Bits of a number written as it is.
const RAW: u32 = 32;

/// Reads back `count` numbers of [`put_signed`].
pub fn take_signed(input: &mut Reader<'_>, count: usize) -> Result<Vec<i32>, Malformed> {
    let mut numbers = Vec::with_capacity(count);
    while numbers.len() < count {
        let block = (count - numbers.len()).min(BLOCK);
        let k = input.take(4)?;
        if k == ALL_ZERO {
            numbers.extend(std::iter::repeat_n(0, block));
            continue;
        }
        for _ in 0..block {
            let mut ones = 0;
            while ones < UNARY_MAX && input.take(1)? == 1 {
                ones += 1;
            }
            let n = if ones == UNARY_MAX { input.take(RAW)? } else { (ones << k) | input.take(k)? };
            numbers.push(unzigzag(n));
        }
    }
    Ok(numbers)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn three_digits_are_kept() {
        for (value, kept) in [(0, 0), (7, 7), (999, 999), (1000, 1000), (1234, 1230), (1235, 1240), (99_949, 99_900), (99_951, 100_000)] {
            assert_eq!(Code::of(value).value(), Some(kept), "{value}");
        }
        assert_eq!(Code::NONE.value(), None);
        assert_eq!(Code::of(u64::MAX).value(), Some(18_400_000_000_000_000_000));
    }

    proptest! {
        #[test]
        fn a_code_is_within_half_a_percent_and_keeps_the_order(a: u64, shift in 0u32..64, b: u64, other in 0u32..64) {
            let (a, b) = (a >> shift, b >> other);
            let kept = Code::of(a).value().unwrap();
            prop_assert!(kept.abs_diff(a) <= a / 200, "{a} became {kept}");
            prop_assert!(a <= b || Code::of(a) >= Code::of(b));
            prop_assert_eq!(Code::of(kept), Code::of(a));
        }

        #[test]
        fn numbers_come_back(numbers in prop::collection::vec(prop_oneof![Just(0i32), -20i32..20, any::<i32>()], 0..300)) {
            let mut out = Writer::default();
            put_signed(&mut out, &numbers);
            let bytes = out.finish();
            prop_assert_eq!(take_signed(&mut Reader::new(&bytes), numbers.len()).unwrap(), numbers);
        }

        #[test]
        fn any_bytes_are_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..200), count in 0usize..500) {
            let _ = take_signed(&mut Reader::new(&bytes), count);
        }
    }
}
