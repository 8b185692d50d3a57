//! The reader over images made here: every layout, form and size that the format allows.

mod support;

use rafs_format::{ChunkTable, Layout, Tree, check_references};
use support::{BLOCK, Body, Builder, ROOT, Spec, dir_data, file_content, sample};

#[test]
fn compact_and_extended_inodes() {
    let mut b = Builder::new(1 << 20, 0);
    let spec = Spec {
        uid: 1000,
        gid: 65535,
        nlink: 3,
        mtime: 99,
        nsec: 98,
        ..Spec::new(0o104755)
    };
    let compact = b.inode(&spec, &Body::Plain(b"x".to_vec()));
    let wide = Spec {
        uid: 1 << 20,
        gid: u32::MAX,
        nlink: 70_000,
        mtime: 12,
        nsec: 999_999_999,
        ..spec
    };
    let extended = b.inode(
        &Spec {
            extended: true,
            ..wide
        },
        &Body::Plain(b"x".to_vec()),
    );
    let before_1970 = Spec {
        mtime: (-5i64) as u64,
        ..Spec::extended(0o100644)
    };
    let old = b.inode(&before_1970, &Body::None);
    let image = b.finish(&[(b"c", compact, 1), (b"e", extended, 1), (b"o", old, 1)]);
    let tree = Tree::parse(&image).unwrap();

    let i = tree.inode(compact).unwrap();
    assert_eq!(
        (i.mode, i.uid, i.gid, i.nlink, i.size),
        (0o104755, 1000, 65535, 3, 1)
    );
    assert_eq!(
        (i.mtime, i.mtime_nsec),
        (1_700_000_000, 5),
        "the build time stands in"
    );
    assert_eq!((i.nid, i.ino), (compact, compact));
    let i = tree.inode(extended).unwrap();
    assert_eq!((i.uid, i.gid, i.nlink), (1 << 20, u32::MAX, 70_000));
    assert_eq!((i.mtime, i.mtime_nsec), (12, 999_999_999));
    assert_eq!(tree.inode(old).unwrap().mtime, -5);
    assert!(tree.blobs().unwrap().is_empty());
}

#[test]
fn special_files() {
    let mut b = Builder::new(1 << 20, 0);
    // Major 4095 and minor 1 048 575 in the kernel's form.
    let device = Spec {
        rdev: 0xffff_ffff,
        ..Spec::new(0o20600)
    };
    let character = b.inode(&device, &Body::None);
    let block = b.inode(
        &Spec {
            mode: 0o60600,
            rdev: 0x0801,
            ..device.clone()
        },
        &Body::None,
    );
    let fifo = b.inode(
        &Spec {
            mode: 0o10600,
            ..device.clone()
        },
        &Body::None,
    );
    let socket = b.inode(
        &Spec {
            mode: 0o140_600,
            ..device
        },
        &Body::None,
    );
    let image = b.finish(&[
        (b"b", block, 4),
        (b"c", character, 3),
        (b"f", fifo, 5),
        (b"s", socket, 6),
    ]);
    let tree = Tree::parse(&image).unwrap();
    assert_eq!(tree.inode(character).unwrap().device(), (4095, 0xf_ffff));
    assert_eq!(tree.inode(block).unwrap().device(), (8, 1));
    assert_eq!(tree.inode(fifo).unwrap().rdev, 0);
    assert_eq!(tree.inode(socket).unwrap().d_type(), 12);
    let root = tree.inode(ROOT).unwrap();
    let types: Vec<u8> = tree.entries(&root, 0).map(|e| e.unwrap().d_type).collect();
    assert_eq!(types, [4, 4, 6, 2, 1, 12]);
    let usage = check_references(&tree, &[]).unwrap();
    assert_eq!((usage.directories, usage.others), (1, 4));
}

#[test]
fn files_and_links_in_the_bootstrap() {
    for size in [
        0,
        1,
        100,
        BLOCK - 1,
        BLOCK,
        BLOCK + 1,
        3 * BLOCK,
        3 * BLOCK + 7,
    ] {
        let content: Vec<u8> = (0..size).map(|i| (i % 251) as u8).collect();
        let mut b = Builder::new(1 << 20, 0);
        let plain = b.inode(&Spec::new(0o100644), &Body::Plain(content.clone()));
        let inline = b.inode(&Spec::extended(0o100644), &Body::Inline(content.clone()));
        let image = b.finish(&[(b"i", inline, 1), (b"p", plain, 1)]);
        let tree = Tree::parse(&image).unwrap();
        for nid in [plain, inline] {
            let inode = tree.inode(nid).unwrap();
            assert_eq!(file_content(&tree, &inode).unwrap(), content);
            assert!(tree.chunks(&inode, 0, 1).next().unwrap().is_err());
            assert_eq!(tree.inline_data(&inode, size as u64, 5).unwrap(), b"");
            assert_eq!(tree.inline_data(&inode, u64::MAX, u64::MAX).unwrap(), b"");
        }
    }
    for len in [1, 59, 4096] {
        let target = vec![b't'; len];
        let mut b = Builder::new(1 << 20, 0);
        let plain = b.inode(&Spec::new(0o120777), &Body::Plain(target.clone()));
        let inline = b.inode(&Spec::new(0o120777), &Body::Inline(target.clone()));
        let image = b.finish(&[(b"i", inline, 7), (b"p", plain, 7)]);
        let tree = Tree::parse(&image).unwrap();
        for nid in [plain, inline] {
            assert_eq!(tree.readlink(&tree.inode(nid).unwrap()).unwrap(), target);
        }
        assert!(tree.readlink(&tree.inode(ROOT).unwrap()).is_err());
    }
    for target in [vec![], vec![b't'; 4097], b"a\0b".to_vec()] {
        let mut b = Builder::new(1 << 20, 0);
        let link = b.inode(&Spec::new(0o120777), &Body::Plain(target));
        let image = b.finish(&[(b"l", link, 7)]);
        let tree = Tree::parse(&image).unwrap();
        assert!(tree.inode(link).and_then(|i| tree.readlink(&i)).is_err());
    }
}

#[test]
fn directory_of_100_000_entries() {
    let names: Vec<String> = (0..100_000).map(|i| format!("entry-{i:06}")).collect();
    for inline in [false, true] {
        let mut b = Builder::new(1 << 20, 0);
        let file = b.inode(&Spec::new(0o100644), &Body::None);
        let mut entries: Vec<(&[u8], u64, u8)> = vec![(b".", 1, 2), (b"..", ROOT, 2)];
        entries.extend(names.iter().map(|n| (n.as_bytes(), file, 1)));
        let data = dir_data(&entries);
        let body = if inline {
            Body::Inline(data)
        } else {
            Body::Plain(data)
        };
        let dir = b.inode(&Spec::extended(0o40755), &body);
        let image = b.finish(&[(b"dir", dir, 2), (b"file", file, 1)]);
        let tree = Tree::parse(&image).unwrap();
        let dir = tree.inode(dir).unwrap();

        let listed: Vec<_> = tree.entries(&dir, 0).map(|e| e.unwrap()).collect();
        assert_eq!(listed.len(), 100_002);
        for (entry, name) in listed.iter().skip(2).zip(&names) {
            assert_eq!(
                (entry.name, entry.nid, entry.d_type),
                (name.as_bytes(), file, 8)
            );
        }
        for name in names.iter().step_by(37) {
            assert_eq!(tree.lookup(&dir, name.as_bytes()).unwrap(), Some((file, 8)));
            assert_eq!(
                tree.lookup(&dir, format!("{name}x").as_bytes()).unwrap(),
                None
            );
        }
        for absent in [&b""[..], b"!", b"entry-", b"entry-100000", b"f"] {
            assert_eq!(tree.lookup(&dir, absent).unwrap(), None);
        }
        // Listing goes on from any cookie, as a guest with a small buffer asks for it.
        let mut cookie = 0;
        let mut again = Vec::new();
        loop {
            let part: Vec<_> = tree
                .entries(&dir, cookie)
                .take(317)
                .map(|e| e.unwrap())
                .collect();
            let Some(last) = part.last() else { break };
            cookie = last.next_cookie;
            again.extend(part);
        }
        assert_eq!(again, listed);
    }
}

#[test]
fn names_of_all_lengths_and_blocks_without_padding() {
    // 16 entries of 12 + 244 bytes fill a block: its last name has no NUL.
    let names: Vec<Vec<u8>> = (0..48)
        .map(|i| [&[b'A' + i / 2, b'a' + i % 2][..], &[b'n'; 242]].concat())
        .collect();
    let mut b = Builder::new(1 << 20, 0);
    let file = b.inode(&Spec::new(0o100644), &Body::None);
    let entries: Vec<_> = names.iter().map(|n| (n.as_slice(), file, 1)).collect();
    let data = dir_data(&entries);
    assert_eq!(data.len(), 3 * BLOCK);
    let full = b.inode(&Spec::new(0o40755), &Body::Inline(data));
    let long: Vec<Vec<u8>> = (1..=255).map(|len| vec![b'x'; len]).collect();
    let entries: Vec<_> = long.iter().map(|n| (n.as_slice(), file, 1)).collect();
    let lengths = b.inode(&Spec::new(0o40755), &Body::Plain(dir_data(&entries)));
    let image = b.finish(&[(b"full", full, 2), (b"lengths", lengths, 2)]);
    let tree = Tree::parse(&image).unwrap();
    for (nid, names) in [(full, &names), (lengths, &long)] {
        let dir = tree.inode(nid).unwrap();
        let listed: Vec<_> = tree
            .entries(&dir, 0)
            .map(|e| e.unwrap().name.to_vec())
            .collect();
        assert_eq!(&listed, names);
        for name in names {
            assert_eq!(tree.lookup(&dir, name).unwrap(), Some((file, 8)));
        }
        assert_eq!(tree.lookup(&dir, &[b'x'; 256]).unwrap(), None);
    }
    assert!(tree.lookup(&tree.inode(file).unwrap(), b"a").is_err());
    assert!(
        tree.entries(&tree.inode(file).unwrap(), 0)
            .next()
            .unwrap()
            .is_err()
    );
}

#[test]
fn extended_attributes() {
    let mut b = Builder::new(1 << 20, 0);
    let xattrs = vec![
        (1, b"a".to_vec(), Vec::new()),
        (1, vec![b'n'; 250], vec![3; 65535]),
        (2, Vec::new(), b"acl".to_vec()),
        (3, Vec::new(), b"default".to_vec()),
        (4, b"overlay.opaque".to_vec(), b"y".to_vec()),
        (6, b"capability".to_vec(), vec![0, 1, 2]),
    ];
    let with = b.inode(
        &Spec {
            xattrs: xattrs.clone(),
            ..Spec::new(0o100644)
        },
        &Body::Inline(b"tail".to_vec()),
    );
    let without = b.inode(&Spec::new(0o100644), &Body::None);
    let image = b.finish(&[(b"with", with, 1), (b"without", without, 1)]);
    let tree = Tree::parse(&image).unwrap();
    let inode = tree.inode(with).unwrap();
    let found: Vec<_> = tree.xattrs(&inode).map(|x| x.unwrap()).collect();
    let prefixes: [&[u8]; 6] = [
        b"user.",
        b"user.",
        b"system.posix_acl_access",
        b"system.posix_acl_default",
        b"trusted.",
        b"security.",
    ];
    assert_eq!(found.len(), 6);
    for ((prefix, suffix, value), (expected, (_, name, content))) in
        found.iter().zip(prefixes.iter().zip(&xattrs))
    {
        assert_eq!(
            (prefix, *suffix, *value),
            (expected, &name[..], &content[..])
        );
        let full = [*prefix, *suffix].concat();
        assert_eq!(tree.xattr_get(&inode, &full).unwrap(), Some(&content[..]));
    }
    for absent in [
        &b"user."[..],
        b"user",
        b"",
        b"system.posix_acl_accessx",
        b"lustre.x",
    ] {
        assert_eq!(tree.xattr_get(&inode, absent).unwrap(), None);
    }
    assert_eq!(file_content(&tree, &inode).unwrap(), b"tail");
    let inode = tree.inode(without).unwrap();
    assert!(!inode.has_xattr());
    assert_eq!(tree.xattrs(&inode).count(), 0);
    assert_eq!(tree.xattr_get(&inode, b"user.a").unwrap(), None);

    for (index, name) in [
        (0, &b"x"[..]),
        (5, b"x"),
        (7, b"x"),
        (1, b""),
        (2, b"x"),
        (1, b"a\0"),
        (1, &[b'n'; 251]),
    ] {
        let mut b = Builder::new(1 << 20, 0);
        let spec = Spec {
            xattrs: vec![(index, name.to_vec(), Vec::new())],
            ..Spec::new(0o100644)
        };
        let nid = b.inode(&spec, &Body::None);
        let image = b.finish(&[(b"f", nid, 1)]);
        let tree = Tree::parse(&image).unwrap();
        let inode = tree.inode(nid).unwrap();
        let items: Vec<_> = tree.xattrs(&inode).collect();
        assert!(matches!(items[..], [Err(_)]), "{index} {name:?}");
        assert!(tree.xattr_get(&inode, b"user.x").is_err());
    }
}

#[test]
fn chunks_of_all_sizes() {
    for bits in 12..=24 {
        let stride = 1u64 << bits;
        let mut b = Builder::new(1 << bits, 1);
        let size = 3 * stride + 77;
        let nid = b.file(&Spec::extended(0o100644), 0, size);
        let image = b.finish(&[(b"f", nid, 1)]);
        let tree = Tree::parse(&image).unwrap();
        let inode = tree.inode(nid).unwrap();
        let parts = |offset, len| -> Vec<(u32, u32, u32)> {
            let parts = tree.chunks(&inode, offset, len).map(|c| c.unwrap());
            parts
                .map(|c| (c.chunk_index, c.chunk_offset, c.len))
                .collect()
        };
        let s = stride as u32;
        assert_eq!(
            parts(0, u64::MAX),
            [(0, 0, s), (1, 0, s), (2, 0, s), (3, 0, 77)]
        );
        assert_eq!(parts(stride - 1, 2), [(0, s - 1, 1), (1, 0, 1)]);
        assert_eq!(parts(stride, stride), [(1, 0, s)]);
        assert_eq!(parts(size - 1, 100), [(3, 76, 1)]);
        assert_eq!(parts(0, 0), []);
        assert_eq!(parts(size, 1), []);
        assert_eq!(parts(u64::MAX, u64::MAX), []);
        let maps = ChunkTable::parse(&tree).unwrap().into_maps();
        assert_eq!(check_references(&tree, &maps).unwrap().bytes, size);
    }
}

#[test]
fn files_beyond_4_gib() {
    let mut b = Builder::new(16 << 20, 1);
    let size = (5 << 30) + 4097;
    let nid = b.file(&Spec::extended(0o100644), 0, size);
    let image = b.finish(&[(b"f", nid, 1)]);
    let tree = Tree::parse(&image).unwrap();
    let inode = tree.inode(nid).unwrap();
    assert_eq!(inode.size, size);
    let last = tree
        .chunks(&inode, 5 << 30, u64::MAX)
        .last()
        .unwrap()
        .unwrap();
    assert_eq!(
        (last.chunk_index, last.len, last.data_offset),
        (320, 4097, 5 << 30)
    );
}

#[test]
fn blobs_up_to_255() {
    let mut b = Builder::new(4096, 255);
    let files: Vec<_> = (0..255)
        .map(|i| b.file(&Spec::new(0o100644), i, 5000))
        .collect();
    let names: Vec<_> = (0..255).map(|i| format!("{i:03}")).collect();
    let entries: Vec<_> = files
        .iter()
        .zip(&names)
        .map(|(f, n)| (n.as_bytes(), *f, 1))
        .collect();
    let image = b.finish(&entries);
    let tree = Tree::parse(&image).unwrap();
    assert_eq!(tree.blobs().unwrap().len(), 255);
    for (i, nid) in files.iter().enumerate() {
        let inode = tree.inode(*nid).unwrap();
        let parts: Vec<_> = tree.chunks(&inode, 0, 5000).map(|c| c.unwrap()).collect();
        assert_eq!(
            parts
                .iter()
                .map(|p| usize::from(p.blob_index))
                .collect::<Vec<_>>(),
            [i, i]
        );
    }
    let image = Builder::new(4096, 256).finish(&[]);
    assert_eq!(
        Tree::parse(&image).unwrap_err().what,
        "ext_superblock.blob_table_size"
    );
}

#[test]
fn hard_links_share_their_inode() {
    let image = sample();
    let tree = Tree::parse(&image).unwrap();
    let root = tree.inode(ROOT).unwrap();
    let big = tree.lookup(&root, b"big").unwrap().unwrap();
    let dir = tree
        .inode(tree.lookup(&root, b"dir").unwrap().unwrap().0)
        .unwrap();
    assert_eq!(dir.layout, Layout::FlatInline);
    assert_eq!(tree.lookup(&dir, b"again").unwrap(), Some(big));
    let maps = ChunkTable::parse(&tree).unwrap().into_maps();
    let usage = check_references(&tree, &maps).unwrap();
    assert_eq!((usage.directories, usage.files, usage.others), (2, 4, 3));
    assert_eq!(usage.bytes, 10_000 + 100 + 5000 + 5000);
    assert_eq!(tree.prefetch().count(), 2);
}
