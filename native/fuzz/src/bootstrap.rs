//! Invariant: no bootstrap makes a reader panic, run for ever or allocate what it claims, and what is read agrees with itself.
//!
//! Every reader method is called: names that `entries` gives are found by `lookup`, a cookie continues where it was given,
//! parts of chunks cover a file without gap, and names that a guest cannot have are never seen.

use std::collections::HashSet;

use chunk_store::Promise;
use rafs_format::{Inode, Layout, Nid, Tree};

use crate::image;
use crate::input::{Input, damage, write_at};

/// Names and chunk parts that one run looks at. What a single call does is bounded by the image alone.
const STEPS: usize = 4_000;

struct Walk<'a> {
    tree: Tree<'a>,
    left: usize,
}

impl Walk<'_> {
    fn step(&mut self) -> bool {
        self.left = self.left.saturating_sub(1);
        self.left > 0
    }

    fn directory(&mut self, dir: &Inode) {
        let (tree, limit) = (self.tree, self.tree.image().len());
        let mut seen = 0;
        let mut previous: Option<&[u8]> = None;
        let mut differs = None;
        for entry in tree.entries(dir, 0) {
            seen += 1;
            assert!(seen <= limit, "more entries than bytes");
            let Ok(entry) = entry else {
                // Names that are not sorted end the listing; a lookup may have found one behind that place.
                differs = None;
                break;
            };
            assert!(!entry.name.is_empty() && entry.name.len() <= 255);
            assert!(!entry.name.contains(&0) && !entry.name.contains(&b'/'));
            assert!(previous < Some(entry.name), "names are sorted");
            previous = Some(entry.name);
            // A block whose first name is damaged hides others from a lookup, but never changes what is found.
            if let Ok(Some(found)) = tree.lookup(dir, entry.name) {
                if found != (entry.nid, entry.d_type) {
                    differs.get_or_insert((entry, found));
                }
            }
            if seen % 64 == 1 {
                let next = tree.entries(dir, entry.next_cookie).next();
                if let Some(Ok(next)) = next {
                    assert!(next.name > entry.name, "a cookie goes on behind its name");
                }
            }
            if !self.step() {
                return;
            }
        }
        assert!(differs.is_none(), "a name is two: {differs:?}");
        for name in [&b"."[..], b"", b"big", b"\xff\xff", &[b'n'; 300]] {
            let _ = tree.lookup(dir, name);
        }
        for cookie in [1, 1 << 10, 1 << 40, u64::MAX] {
            assert!(tree.entries(dir, cookie).take(limit + 1).count() <= limit);
        }
    }

    fn chunks(&mut self, inode: &Inode, offset: u64, len: u64) {
        let (tree, size) = (self.tree, inode.size);
        let mut at = offset;
        for part in tree.chunks(inode, offset, len) {
            let Ok(part) = part else { return };
            assert!(part.len > 0);
            let end = u64::from(part.chunk_offset) + u64::from(part.len);
            assert!(end <= u64::from(tree.superblock().chunk_size));
            at += u64::from(part.len);
            assert!(
                at <= size && at - offset <= len,
                "beyond what was asked for"
            );
            if !self.step() {
                return;
            }
        }
        if offset < size {
            assert_eq!(at, offset.saturating_add(len).min(size), "a gap");
        }
    }

    fn inline(&mut self, inode: &Inode) {
        let mut at = 0;
        while let Ok(piece) = self.tree.inline_data(inode, at, u64::MAX) {
            if piece.is_empty() {
                assert_eq!(at, inode.size, "a hole in a file of the bootstrap");
                break;
            }
            at += piece.len() as u64;
            assert!(at <= inode.size);
        }
        for offset in [inode.size, inode.size.wrapping_sub(1), u64::MAX, 4095] {
            let _ = self.tree.inline_data(inode, offset, 2);
        }
    }

    fn inode(&mut self, nid: Nid) -> Option<Inode> {
        let tree = self.tree;
        let inode = tree.inode(nid).ok()?;
        if inode.is_dir() {
            self.directory(&inode);
        }
        if let Ok(target) = tree.readlink(&inode) {
            assert!(inode.is_symlink() && !target.is_empty() && !target.contains(&0));
        }
        let limit = tree.image().len();
        let mut seen = 0;
        for attribute in tree.xattrs(&inode) {
            seen += 1;
            assert!(seen <= limit, "more attributes than bytes");
            let Ok((prefix, suffix, _)) = attribute else {
                break;
            };
            let name = [prefix, suffix].concat();
            assert!(name.len() <= 255 && !name.contains(&0));
            assert!(tree.xattr_get(&inode, &name).is_ok_and(|v| v.is_some()));
            // Each look is a walk of its own.
            if seen > 64 || !self.step() {
                break;
            }
        }
        let _ = tree.xattr_get(&inode, b"user.none");
        if inode.layout == Layout::ChunkBased {
            for (offset, len) in [(0, u64::MAX), (4095, 2), (inode.size / 2, 1), (u64::MAX, 9)] {
                self.chunks(&inode, offset, len);
            }
        } else if inode.is_file() {
            self.inline(&inode);
        }
        let _ = inode.device();
        Some(inode)
    }
}

fn walk(image: &[u8]) {
    let Ok(tree) = Tree::parse(image) else { return };
    let mut walk = Walk { tree, left: STEPS };
    // From the root, as a guest would, then every number that a guest can make up.
    let mut seen = HashSet::from([tree.root()]);
    let mut waiting = vec![tree.root()];
    while let Some(nid) = waiting.pop() {
        let Some(inode) = walk.inode(nid) else {
            continue;
        };
        for entry in tree.entries(&inode, 0).flatten() {
            if walk.step() && seen.insert(entry.nid) {
                waiting.push(entry.nid);
            }
        }
    }
    walk.left = STEPS;
    let slots = (image.len() as u64 - tree.superblock().meta_offset) / 32;
    for nid in (0..=slots).chain([u64::MAX, 1 << 59, u64::MAX / 32]) {
        if walk.left == 0 {
            break;
        }
        walk.inode(nid);
    }
    let mut runs = 0u64;
    let _ = tree.runs(tree.root(), 0, u64::MAX, |run| runs += u64::from(run.count));
    for nid in tree.prefetch() {
        let _ = tree.runs(nid, 5, 1 << 20, |run| assert!(run.count > 0));
    }
    if let Ok(paths) = chunk_store::paths(image, &seen) {
        assert!(paths.len() <= seen.len());
    }
    if let Ok(promise) = Promise::parse(image) {
        for index in 0..promise.entries().len() {
            promise.known(index);
            if let Ok(spec) = promise.spec(index) {
                spec.check_overlap().expect("chunks that share no bytes");
                spec.map_digest();
            }
        }
    }
}

/// First byte: 0 = the rest is the image; 1 = our builder's image with damage; 2 = the other sample with damage.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let mut bytes = match input.u8() % 3 {
        0 => input.rest().to_vec(),
        1 => image::built().bootstrap.clone(),
        _ => image::sample().to_vec(),
    };
    damage(&mut input, &mut bytes);
    walk(&bytes);
}

pub fn seeds() -> Vec<Vec<u8>> {
    let mut seeds = vec![vec![1], vec![2]];
    for (kind, image) in [(1, &image::built().bootstrap[..]), (2, image::sample())] {
        seeds.push([&[0], image].concat());
        let tree = Tree::parse(image).expect("an image");
        let meta = tree.superblock().meta_offset;
        // One seed per inode with another size, form, mode or place, and per field of the head.
        for nid in 0..(image.len() as u64 - meta) / 32 {
            if tree.inode(nid).is_err() || nid % 3 != 0 && nid != tree.root() {
                continue;
            }
            let at = (meta + 32 * nid) as usize;
            let mut seed = vec![kind];
            seed.extend(write_at(at + 8, &u64::MAX.to_le_bytes()));
            seeds.push(seed);
            seeds.push([&[kind][..], &write_at(at + 2, &[0xff, 0xff])].concat());
        }
        for at in (1024..1024 + 384).step_by(8) {
            seeds.push([&[kind][..], &write_at(at, &[0x10; 8])].concat());
        }
    }
    seeds
}
