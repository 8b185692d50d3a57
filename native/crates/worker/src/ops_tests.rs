//! Metadata operations with whatever arguments a driver may send.

use fuse_abi::reply::{ENTRY_OUT_LEN, OUT_HEADER_LEN, dirent_len};
use rafs_format::Tree;
use virtq::testing::Random;

use super::*;
use crate::testing::image::{Body, Builder, ROOT, Spec, dir_data};
use crate::testing::{read_args, sample};

fn ask(
    tree: &Tree<'_>,
    code: u32,
    nodeid: u64,
    args: &[u8],
    room: usize,
) -> Result<Vec<u8>, Errno> {
    let mut out = vec![0; OUT_HEADER_LEN];
    answer(tree, code, nodeid, args, room, &mut out).map(|()| out.split_off(OUT_HEADER_LEN))
}

/// All node ids that exist, and some that do not.
fn nodes(tree: &Tree<'_>) -> Vec<u64> {
    let root = tree.inode(tree.root()).unwrap();
    tree.entries(&root, 0)
        .map(|e| nodeid_of(e.unwrap().nid, tree.root()))
        .chain([0, 1, 2, 3, 129, 1 << 20, 1 << 48, (1 << 48) | 1, u64::MAX])
        .collect()
}

#[test]
fn no_opcode_with_any_arguments_panics() {
    let image = sample();
    let tree = Tree::parse(&image).unwrap();
    let mut random = Random::new(1);
    let codes = (0..=255).chain([4095, 4096, 1 << 16, 1 << 31, u32::MAX]);
    for code in codes {
        for &nodeid in &nodes(&tree) {
            for len in [0, 1, 7, 8, 9, 15, 16, 19, 20, 24, 39, 40, 300, 512] {
                let mut args = vec![0u8; len];
                match random.below(4) {
                    0 => {}
                    1 => args.fill(0xff),
                    2 => args.fill(b'a'),
                    _ => random.fill(&mut args),
                }
                let room = [0, 16, 152, 4096, usize::MAX][random.below(5) as usize];
                match ask(&tree, code, nodeid, &args, room) {
                    Ok(out) => assert!(out.len() <= READDIR_MAX),
                    Err(Errno(errno)) => assert!(
                        (1..=libc::EHWPOISON).contains(&errno),
                        "opcode {code}: errno {errno}"
                    ),
                }
            }
        }
    }
}

#[test]
fn what_is_not_supported_says_so() {
    let image = sample();
    let tree = Tree::parse(&image).unwrap();
    for code in 0..=4096 {
        let got = ask(&tree, code, ROOT_NODE, &[0; 64], 4096);
        if opcode::is_write(code) {
            assert_eq!(got, Err(Errno(libc::EROFS)), "{code}");
        } else if !known(code) {
            assert_eq!(got, Err(Errno(libc::ENOSYS)), "{code}");
        }
    }
}

const ROOT_NODE: u64 = fuse_abi::ROOT_ID;

fn known(code: u32) -> bool {
    matches!(
        code,
        opcode::LOOKUP
            | opcode::GETATTR
            | opcode::READLINK
            | opcode::STATFS
            | opcode::RELEASE
            | opcode::GETXATTR
            | opcode::LISTXATTR
            | opcode::READDIR
            | opcode::READDIRPLUS
            | opcode::RELEASEDIR
            | opcode::ACCESS
            | opcode::DESTROY
            | opcode::LSEEK
            | opcode::SYNCFS
    )
}

#[test]
fn damaged_images_yield_errors() {
    let good = sample();
    let mut random = Random::new(2);
    for _ in 0..300 {
        let mut image = good.clone();
        for _ in 0..1 + random.below(12) {
            let at = 4096 + random.below(image.len() as u64 - 4096) as usize;
            image[at] = random.draw() as u8;
        }
        let Ok(tree) = Tree::parse(&image) else {
            continue;
        };
        for nodeid in (0..220).chain([u64::MAX]) {
            for code in [1, 3, 5, 17, 22, 23, 28, 44, 46] {
                let args = match code {
                    1 => b"big\0".to_vec(),
                    22 => b"\0\x10\0\0\0\0\0\0user.comment\0".to_vec(),
                    _ => read_args(0, 4096),
                };
                if let Ok(out) = ask(&tree, code, nodeid, &args, 4096) {
                    assert!(out.len() <= 65_536);
                }
            }
        }
    }
}

fn names(out: &[u8], plus: bool) -> Vec<(Vec<u8>, u64)> {
    let skip = if plus { ENTRY_OUT_LEN } else { 0 };
    let mut found = Vec::new();
    let mut rest = out;
    while !rest.is_empty() {
        let entry = &rest[skip..];
        let next = u64::from_le_bytes(entry[8..16].try_into().unwrap());
        let len = u32::from_le_bytes(entry[16..20].try_into().unwrap()) as usize;
        found.push((entry[24..24 + len].to_vec(), next));
        rest = &rest[skip + dirent_len(len)..];
    }
    found
}

/// An image whose root holds `n` empty files and one directory.
fn crowd(n: usize) -> Vec<u8> {
    let mut b = Builder::new(4096, 0);
    let file = b.inode(&Spec::new(0o100644), &Body::None);
    let inner = dir_data(&[(b".", ROOT, 2), (b"..", ROOT, 2)]);
    let dir = b.inode(&Spec::new(0o40755), &Body::Plain(inner));
    let names: Vec<Vec<u8>> = (0..n).map(|i| format!("file{i:06}").into()).collect();
    let mut entries: Vec<(&[u8], u64, u8)> = names.iter().map(|n| (&n[..], file, 1)).collect();
    entries.push((b"dir", dir, 2));
    b.finish(&entries)
}

#[test]
fn every_directory_entry_comes_once_whatever_the_buffer() {
    let image = crowd(1000);
    let tree = Tree::parse(&image).unwrap();
    let mut random = Random::new(3);
    for code in [opcode::READDIR, opcode::READDIRPLUS] {
        let plus = code == opcode::READDIRPLUS;
        for _ in 0..10 {
            let (mut all, mut offset) = (Vec::new(), 0);
            loop {
                let size = 200 + random.below(3000) as u32;
                let out = ask(&tree, code, ROOT_NODE, &read_args(offset, size), 1 << 20).unwrap();
                assert!(out.len() <= size as usize);
                let Some((_, last)) = names(&out, plus).last().cloned() else {
                    break;
                };
                assert!(last > offset, "it does not go on");
                offset = last;
                all.extend(names(&out, plus).into_iter().map(|n| n.0));
            }
            assert_eq!(all.len(), 1003);
            assert!(all.is_sorted() && all.windows(2).all(|w| w[0] != w[1]));
        }
    }
}

#[test]
fn any_directory_offset_ends() {
    let image = crowd(300);
    let tree = Tree::parse(&image).unwrap();
    let mut random = Random::new(4);
    let edges = [0, 1, 1023, 1024, 1025, 1 << 20, u64::MAX - 1023, u64::MAX];
    for n in 0..2000 {
        let offset = edges.get(n).copied().unwrap_or_else(|| {
            let bits = random.below(64);
            random.draw() >> bits
        });
        for code in [opcode::READDIR, opcode::READDIRPLUS] {
            for (size, room) in [(0, 4096), (4096, 0), (100, 4096), (u32::MAX, usize::MAX)] {
                let out = ask(&tree, code, ROOT_NODE, &read_args(offset, size), room).unwrap();
                assert!(out.len() <= room.min(size as usize));
                names(&out, code == opcode::READDIRPLUS);
            }
        }
    }
}

#[test]
fn one_answer_holds_only_so_much_of_a_directory() {
    let image = crowd(8000);
    let tree = Tree::parse(&image).unwrap();
    let args = read_args(0, u32::MAX);
    let out = ask(&tree, opcode::READDIRPLUS, ROOT_NODE, &args, usize::MAX).unwrap();
    assert!(out.len() <= READDIR_MAX && out.len() > READDIR_MAX - 300);
}

#[test]
fn attributes_fit_the_callers_buffer_or_say_how_long_they_are() {
    let image = sample();
    let tree = Tree::parse(&image).unwrap();
    let root = tree.inode(tree.root()).unwrap();
    let (nid, _) = tree.lookup(&root, b"big").unwrap().unwrap();
    let node = nodeid_of(nid, tree.root());
    let get = |size: u32, name: &[u8]| {
        let args = [&size.to_le_bytes()[..], &[0; 4], name].concat();
        ask(&tree, opcode::GETXATTR, node, &args, 4096)
    };
    assert_eq!(get(5, b"user.comment\0"), Ok(b"value".to_vec()));
    assert_eq!(get(4, b"user.comment\0"), Err(Errno(libc::ERANGE)));
    assert_eq!(get(0, b"user.comment\0"), Ok(vec![5, 0, 0, 0, 0, 0, 0, 0]));
    assert_eq!(get(64, b"user.other\0"), Err(Errno(libc::ENODATA)));
    assert_eq!(get(64, b"user.comment"), Err(Errno(libc::EINVAL)));
    assert_eq!(get(64, b"\0"), Err(Errno(libc::EINVAL)));
    assert_eq!(get(64, &[b'x'; 300]), Err(Errno(libc::EINVAL)));
    assert_eq!(
        get(64, &[[b'x'; 256].as_slice(), b"\0"].concat()),
        Err(Errno(libc::ERANGE))
    );
    let list = |size: u32| {
        let args = [size.to_le_bytes(), [0; 4]].concat();
        ask(&tree, opcode::LISTXATTR, node, &args, 4096)
    };
    let all = b"user.comment\0security.capability\0system.posix_acl_access\0";
    assert_eq!(list(4096), Ok(all.to_vec()));
    assert_eq!(list(all.len() as u32 - 1), Err(Errno(libc::ERANGE)));
    assert_eq!(list(0).unwrap()[0], all.len() as u8);
}

fn init_args(major: u32, minor: u32, flags: u32, flags2: u32) -> Vec<u8> {
    let mut args = Vec::new();
    for word in [major, minor, 131_072, flags, flags2] {
        args.extend(word.to_le_bytes());
    }
    args.resize(64, 0);
    args
}

fn ask_init(args: &[u8], queue_size: u16) -> (Result<Option<Negotiated>, Errno>, Vec<u8>) {
    let mut out = Vec::new();
    let got = init(args, queue_size, true, &mut out);
    (got, out)
}

#[test]
fn init_with_every_minor() {
    for minor in 12..=45 {
        for flags in [0, 0x73ff_fffb, u32::MAX] {
            for flags2 in [0, 0x5fd, u32::MAX] {
                let (got, out) = ask_init(&init_args(7, minor, flags, flags2), 1024);
                let agreed = got.unwrap().unwrap();
                assert_eq!(agreed.minor, minor.min(41));
                let offered = if u64::from(flags) & init_flags::INIT_EXT != 0 {
                    u64::from(flags) | u64::from(flags2) << 32
                } else {
                    u64::from(flags)
                };
                assert_eq!(agreed.flags & !offered, 0, "flags nobody offered");
                assert_eq!(out.len(), if minor < 23 { 24 } else { 64 });
                let word = |at: usize| u32::from_le_bytes(out[at..at + 4].try_into().unwrap());
                assert_eq!((word(0), word(4), word(8)), (7, minor.min(41), 131_072));
                assert_eq!(word(12), agreed.flags as u32);
            }
        }
    }
}

#[test]
fn init_with_other_majors_and_short_arguments() {
    assert_eq!(
        ask_init(&init_args(6, 40, 0, 0), 64).0,
        Err(Errno(libc::EPROTO))
    );
    let (got, out) = ask_init(&init_args(8, 0, u32::MAX, u32::MAX), 64);
    assert_eq!(got, Ok(None));
    assert_eq!((out[0], out[12]), (7, 0));
    for len in 0..8 {
        assert_eq!(
            ask_init(&init_args(7, 41, 0, 0)[..len], 64).0,
            Err(Errno(libc::EINVAL))
        );
    }
    for len in 8..64 {
        let args = init_args(7, 41, u32::MAX, u32::MAX);
        assert!(ask_init(&args[..len], 64).0.is_ok());
    }
}

#[test]
fn a_request_of_the_granted_size_fits_the_queue() {
    for (queue_size, pages) in [
        (0, 1),
        (1, 1),
        (4, 1),
        (8, 4),
        (128, 124),
        (1024, 1020),
        (u16::MAX, 1024),
    ] {
        let (_, out) = ask_init(&init_args(7, 41, u32::MAX, 0), queue_size);
        assert_eq!(u16::from_le_bytes(out[28..30].try_into().unwrap()), pages);
    }
    assert!(u32::from(1024u16) * 65_536 <= crate::read::MAX_READ);
}

#[test]
fn seeking() {
    let image = sample();
    let tree = Tree::parse(&image).unwrap();
    let root = tree.inode(tree.root()).unwrap();
    let (nid, _) = tree.lookup(&root, b"big").unwrap().unwrap();
    let node = nodeid_of(nid, tree.root());
    let seek = |offset: u64, whence: u32| {
        let mut args = vec![0; 24];
        args[8..16].copy_from_slice(&offset.to_le_bytes());
        args[16..20].copy_from_slice(&whence.to_le_bytes());
        ask(&tree, opcode::LSEEK, node, &args, 8)
            .map(|out| u64::from_le_bytes(out.try_into().unwrap()))
    };
    assert_eq!(seek(0, libc::SEEK_DATA as u32), Ok(0));
    assert_eq!(seek(9_999, libc::SEEK_DATA as u32), Ok(9_999));
    assert_eq!(seek(5, libc::SEEK_HOLE as u32), Ok(10_000));
    for whence in [libc::SEEK_DATA as u32, libc::SEEK_HOLE as u32] {
        for offset in [10_000, u64::MAX] {
            assert_eq!(seek(offset, whence), Err(Errno(libc::ENXIO)));
        }
    }
    for whence in [0, 1, 2, 5, u32::MAX] {
        assert_eq!(seek(0, whence), Err(Errno(libc::EINVAL)));
    }
}
