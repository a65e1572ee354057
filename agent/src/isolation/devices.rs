//! Which device files a group may open: on v1 its `devices` controller, on v2 a program the kernel asks at each open.
//!
//! Nothing is taken away from a group but the devices it is kept from: what a host lets its users open is the host's
//! business.

use std::fmt;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

/// Most devices a group can be kept from: the kernel bounds the program.
pub const NODES_MAX: usize = 512;

/// A device file by what the kernel knows it as, whatever its path.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct DeviceNode {
    pub block: bool,
    pub major: u32,
    pub minor: u32,
}

impl DeviceNode {
    /// The device behind a path; an error for what is no device file.
    pub fn of(path: &Path) -> io::Result<DeviceNode> {
        let meta = fs::metadata(path)?;
        let kind = meta.file_type();
        if !kind.is_char_device() && !kind.is_block_device() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is no device file"));
        }
        Ok(DeviceNode { block: kind.is_block_device(), major: rustix::fs::major(meta.rdev()), minor: rustix::fs::minor(meta.rdev()) })
    }
}

/// As v1 reads it: `c 195:0`.
impl fmt::Display for DeviceNode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let DeviceNode { block, major, minor } = self;
        write!(f, "{} {major}:{minor}", if *block { 'b' } else { 'c' })
    }
}

/// One instruction of the kernel's machine.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct Instruction {
    code: u8,
    /// Destination in the low half, source in the high half.
    registers: u8,
    offset: i16,
    value: i32,
}

// The few codes used here, from linux/bpf.h.
const LOAD_WORD: u8 = 0x61; // LDX | MEM | W
const AND: u8 = 0x54; // ALU | AND | K, 32 bits
const UNLESS_EQUAL: u8 = 0x55; // JMP | JNE | K
const SET: u8 = 0xb7; // ALU64 | MOV | K
const EXIT: u8 = 0x95; // JMP | EXIT
const BLOCK: i32 = 1; // BPF_DEVCG_DEV_BLOCK
const CHARACTER: i32 = 2; // BPF_DEVCG_DEV_CHAR

/// Answers 0 (refused) for each of the nodes and 1 for all others.
fn program(nodes: &[DeviceNode]) -> Vec<Instruction> {
    let op = |code, registers, offset, value| Instruction { code, registers, offset, value };
    // r1 points to { type in the low half of a word, major, minor }: to r2, r3, r4.
    let mut program = vec![op(LOAD_WORD, 0x12, 0, 0), op(AND, 2, 0, 0xffff), op(LOAD_WORD, 0x13, 4, 0), op(LOAD_WORD, 0x14, 8, 0)];
    for node in nodes {
        program.extend([
            op(UNLESS_EQUAL, 2, 4, if node.block { BLOCK } else { CHARACTER }),
            op(UNLESS_EQUAL, 3, 3, node.major as i32),
            op(UNLESS_EQUAL, 4, 2, node.minor as i32),
            op(SET, 0, 0, 0),
            op(EXIT, 0, 0, 0),
        ]);
    }
    program.extend([op(SET, 0, 0, 1), op(EXIT, 0, 0, 0)]);
    program
}

/// `union bpf_attr` as far as it is used.
#[repr(C)]
#[derive(Default)]
struct Load {
    program_type: u32,
    count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
}

#[repr(C)]
#[derive(Default)]
struct Attach {
    target: u32,
    program: u32,
    kind: u32,
    flags: u32,
}

const PROG_LOAD: libc::c_int = 5;
const PROG_ATTACH: libc::c_int = 8;
const TYPE_CGROUP_DEVICE: u32 = 15;
const ATTACH_CGROUP_DEVICE: u32 = 6;
/// Programs of groups above and of others at this one are asked too, and all must agree.
const ALLOW_MULTI: u32 = 2;

fn bpf<T>(command: libc::c_int, attributes: &T) -> io::Result<i32> {
    // SAFETY: the attributes live through the call and their size is given; pointers in them are the caller's.
    let answer = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(attributes), size_of::<T>()) };
    if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(answer as i32) }
}

/// Attaches a program to a v2 group that refuses these devices. It lives as long as the group.
pub fn attach(dir: &Path, nodes: &[DeviceNode]) -> io::Result<()> {
    if nodes.len() > NODES_MAX {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("more than {NODES_MAX} devices")));
    }
    let program = program(nodes);
    let load = Load {
        program_type: TYPE_CGROUP_DEVICE,
        count: program.len() as u32,
        instructions: program.as_ptr() as u64,
        license: c"Apache-2.0".as_ptr() as u64,
        ..Load::default()
    };
    let loaded = bpf(PROG_LOAD, &load)?;
    // SAFETY: the kernel has just made this descriptor for us.
    let loaded = unsafe { OwnedFd::from_raw_fd(loaded) };
    let group = File::open(dir)?;
    let attach =
        Attach { target: group.as_raw_fd() as u32, program: loaded.as_raw_fd() as u32, kind: ATTACH_CGROUP_DEVICE, flags: ALLOW_MULTI };
    bpf(PROG_ATTACH, &attach).map(drop)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_known_by_its_numbers() {
        let node = DeviceNode::of(Path::new("/dev/null")).unwrap();
        assert_eq!((node, node.to_string().as_str()), (DeviceNode { block: false, major: 1, minor: 3 }, "c 1:3"));
        assert!(DeviceNode::of(Path::new("/")).is_err());
        assert!(DeviceNode::of(Path::new("/nonexistent")).is_err());
    }

    #[test]
    fn each_device_is_one_test_of_the_program_and_the_rest_is_let_through() {
        let node = DeviceNode { block: false, major: 195, minor: 1 };
        let program = program(&[node, node]);
        assert_eq!(program.len(), 4 + 2 * 5 + 2);
        assert_eq!(program[5].value, 195);
        // A mismatch jumps to the next test: 4, 3 and 2 instructions on.
        assert_eq!([program[4].offset, program[5].offset, program[6].offset], [4, 3, 2]);
        assert_eq!((program[14].code, program[14].value, program[15].code), (SET, 1, EXIT));
    }
}
