//! The one message of etcd's gRPC the benchmark needs, by hand: `PutRequest { bytes key = 1; bytes value = 2; }`.

use bytes::{BufMut, Bytes, BytesMut};

pub const PATH: &str = "/etcdserverpb.KV/Put";
/// gRPC's head of a message: not compressed, and its length.
const HEAD: usize = 5;

/// A put as one gRPC message.
pub fn encode(key: &[u8], value: &[u8]) -> Bytes {
    let mut message = BytesMut::with_capacity(key.len() + value.len() + 16);
    message.put_bytes(0, HEAD);
    for (tag, bytes) in [(0x0a, key), (0x12, value)] {
        message.put_u8(tag);
        let mut length = bytes.len();
        while length >= 0x80 {
            message.put_u8(length as u8 | 0x80);
            length >>= 7;
        }
        message.put_u8(length as u8);
        message.put_slice(bytes);
    }
    let length = (message.len() - HEAD) as u32;
    message[1..HEAD].copy_from_slice(&length.to_be_bytes());
    message.freeze()
}

/// Key and value of a put; `None` when it is not one.
pub fn decode(message: &[u8]) -> Option<(&[u8], &[u8])> {
    let (head, mut rest) = message.split_at_checked(HEAD)?;
    if u32::from_be_bytes(head[1..].try_into().ok()?) as usize != rest.len() {
        return None;
    }
    let mut fields: [&[u8]; 2] = [&[], &[]];
    while let Some((&tag, after)) = rest.split_first() {
        rest = after;
        let mut length = 0usize;
        for shift in (0..28).step_by(7) {
            let (&byte, after) = rest.split_first()?;
            rest = after;
            length |= usize::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                break;
            }
        }
        let (value, after) = rest.split_at_checked(length)?;
        rest = after;
        match tag {
            0x0a => fields[0] = value,
            0x12 => fields[1] = value,
            _ => return None,
        }
    }
    Some((fields[0], fields[1]))
}
