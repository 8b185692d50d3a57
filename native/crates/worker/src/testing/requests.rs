//! Requests of a driver.

use super::Bench;
use crate::mount::Mount;

/// A FUSE message: in header and arguments.
pub fn message(opcode: u32, nodeid: u64, args: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    out.extend((40 + args.len() as u32).to_le_bytes());
    out.extend(opcode.to_le_bytes());
    out.extend(7u64.to_le_bytes());
    out.extend(nodeid.to_le_bytes());
    out.extend([0; 16]);
    out.extend(args);
    out
}

/// Arguments of READ, READDIR and READDIRPLUS.
pub fn read_args(offset: u64, size: u32) -> Vec<u8> {
    let mut out = vec![0; 40];
    out[8..16].copy_from_slice(&offset.to_le_bytes());
    out[16..20].copy_from_slice(&size.to_le_bytes());
    out
}

/// The node id of `name` in the root of `mount`'s image.
pub fn node(mount: &Mount, name: &[u8]) -> u64 {
    let tree = mount.tree().unwrap();
    let root = tree.inode(tree.root()).unwrap();
    let (nid, _) = tree.lookup(&root, name).unwrap().expect("the file");
    crate::mount::nodeid_of(nid, tree.root())
}

/// GETATTR of the file "small".
pub fn get_attr(bench: &Bench) -> Vec<u8> {
    message(
        fuse_abi::opcode::GETATTR,
        node(bench.mount, b"small"),
        &[0; 16],
    )
}

/// READ of the file "small", which has 100 bytes in one chunk of blob 1.
pub fn read_small(bench: &Bench) -> Vec<u8> {
    message(
        fuse_abi::opcode::READ,
        node(bench.mount, b"small"),
        &read_args(0, 4096),
    )
}
