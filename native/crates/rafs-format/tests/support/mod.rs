//! A small image builder, and a reader that calls everything on untrusted bytes.
#![allow(dead_code)] // each test binary uses a part

use rafs_format::{ChunkTable, FormatError, Inode, Nid, Tree, check_references};

pub const BLOCK: usize = 4096;
/// Node id of the root in every image that is built here.
pub const ROOT: u64 = 128;

/// What an inode says about its file.
#[derive(Clone, Debug)]
pub struct Spec {
    pub extended: bool,
    pub mode: u16,
    pub uid: u32,
    pub gid: u32,
    pub nlink: u32,
    pub mtime: u64,
    pub nsec: u32,
    pub rdev: u32,
    /// Name index, suffix and value.
    pub xattrs: Vec<(u8, Vec<u8>, Vec<u8>)>,
    /// Size to write instead of that of the content.
    pub size: Option<u64>,
}

impl Spec {
    pub fn new(mode: u16) -> Spec {
        Spec {
            extended: false,
            mode,
            uid: 0,
            gid: 0,
            nlink: 1,
            mtime: 0,
            nsec: 0,
            rdev: 0,
            xattrs: Vec::new(),
            size: None,
        }
    }

    pub fn extended(mode: u16) -> Spec {
        Spec {
            extended: true,
            ..Spec::new(mode)
        }
    }
}

/// Content of an inode.
pub enum Body {
    None,
    Plain(Vec<u8>),
    Inline(Vec<u8>),
    /// Blob, chunk and block address of each chunk index.
    Chunks(Vec<(u8, u32, u32)>),
}

/// A chunk of a blob, as the chunk table describes it.
#[derive(Clone, Copy)]
pub struct Chunk {
    pub digest: u8,
    pub flags: u32,
    pub compressed_offset: u64,
    pub compressed_size: u32,
    pub uncompressed_offset: u64,
    pub uncompressed_size: u32,
    pub index: u32,
}

pub struct Builder {
    pub image: Vec<u8>,
    pub chunk_size: u32,
    pub blobs: Vec<Vec<Chunk>>,
    pub prefetch: Vec<u32>,
    blob_table: usize,
    prefetch_table: usize,
    meta: usize,
    root_body: usize,
}

fn put(image: &mut [u8], at: usize, bytes: &[u8]) {
    image[at..at + bytes.len()].copy_from_slice(bytes);
}

/// Directory blocks with these entries (name, node id, EROFS file type), which are sorted here.
pub fn dir_data(entries: &[(&[u8], u64, u8)]) -> Vec<u8> {
    let mut entries = entries.to_vec();
    entries.sort();
    let mut data = Vec::new();
    let mut rest = &entries[..];
    while !rest.is_empty() {
        let (mut used, mut count) = (0, 0);
        while count < rest.len() && used + 12 + rest[count].0.len() <= BLOCK {
            used += 12 + rest[count].0.len();
            count += 1;
        }
        let (block, others) = rest.split_at(count);
        data.resize(usize::next_multiple_of(data.len(), BLOCK), 0);
        let mut nameoff = 12 * count;
        for (name, nid, kind) in block {
            data.extend(nid.to_le_bytes());
            data.extend((nameoff as u16).to_le_bytes());
            data.extend([*kind, 0]);
            nameoff += name.len();
        }
        block.iter().for_each(|e| data.extend(e.0));
        rest = others;
    }
    data
}

impl Builder {
    pub fn new(chunk_size: u32, blobs: usize) -> Builder {
        let blob_table = (1408 + 128 * blobs).next_multiple_of(BLOCK);
        let prefetch_table = blob_table + 256 * blobs;
        let meta = (prefetch_table + 64).next_multiple_of(BLOCK);
        let root_at = meta + ROOT as usize * 32;
        let mut image = vec![0; root_at + 64];
        image.reserve(1 << 16);
        Builder {
            image,
            chunk_size,
            blobs: vec![Vec::new(); blobs],
            prefetch: Vec::new(),
            blob_table,
            prefetch_table,
            meta,
            root_body: root_at,
        }
    }

    /// Appends a chunk of `size` bytes that is stored in `stored` bytes; returns its index and block address.
    pub fn chunk(&mut self, blob: usize, stored: u32, size: u32) -> (u32, u32) {
        let chunks = &mut self.blobs[blob];
        let last = chunks.last();
        let chunk = Chunk {
            digest: chunks.len() as u8,
            flags: u32::from(stored != size),
            compressed_offset: last
                .map_or(0, |c| c.compressed_offset + u64::from(c.compressed_size)),
            compressed_size: stored,
            uncompressed_offset: last.map_or(0, |c| {
                (c.uncompressed_offset + u64::from(c.uncompressed_size)).next_multiple_of(4096)
            }),
            uncompressed_size: size,
            index: chunks.len() as u32,
        };
        chunks.push(chunk);
        (chunk.index, (chunk.uncompressed_offset / 4096) as u32)
    }

    fn align(&mut self, to: usize) -> usize {
        let at = self.image.len().next_multiple_of(to);
        self.image.resize(at, 0);
        at
    }

    /// Appends an inode with its content; returns its node id.
    pub fn inode(&mut self, spec: &Spec, body: &Body) -> u64 {
        let union = match body {
            Body::Plain(data) => self.blocks(data),
            Body::Inline(data) => {
                let whole = data.len().saturating_sub(1) / BLOCK * BLOCK;
                self.blocks(&data[..whole])
            }
            _ => 0,
        };
        let at = self.align(32);
        let head = self.head(spec, body, union);
        self.image.extend(head);
        ((at - self.meta) / 32) as u64
    }

    fn blocks(&mut self, data: &[u8]) -> u32 {
        if data.is_empty() {
            return 0;
        }
        let at = self.align(BLOCK);
        self.image.extend(data);
        (at / BLOCK) as u32
    }

    /// The bytes of inode, attributes, and tail or chunk indexes.
    fn head(&self, spec: &Spec, body: &Body, block: u32) -> Vec<u8> {
        let mut xattrs = Vec::new();
        for (index, name, value) in &spec.xattrs {
            xattrs.extend([name.len() as u8, *index]);
            xattrs.extend((value.len() as u16).to_le_bytes());
            xattrs.extend(name);
            xattrs.extend(value);
            xattrs.resize(xattrs.len().next_multiple_of(4), 0);
        }
        let icount = if xattrs.is_empty() {
            0
        } else {
            xattrs.len() / 4 + 1
        };
        let (layout, size, union) = match body {
            Body::None => (0, 0, spec.rdev),
            Body::Plain(data) => (0, data.len() as u64, block),
            Body::Inline(data) => (2, data.len() as u64, block),
            Body::Chunks(chunks) => {
                let bits = 0x20 | (self.chunk_size.trailing_zeros() - 12);
                (4, chunks.len() as u64 * u64::from(self.chunk_size), bits)
            }
        };
        let size = spec.size.unwrap_or(size);
        let mut head = vec![0; if spec.extended { 64 } else { 32 }];
        put(
            &mut head,
            0,
            &(layout << 1 | u16::from(spec.extended)).to_le_bytes(),
        );
        put(&mut head, 2, &(icount as u16).to_le_bytes());
        put(&mut head, 4, &spec.mode.to_le_bytes());
        put(&mut head, 16, &union.to_le_bytes());
        if spec.extended {
            put(&mut head, 8, &size.to_le_bytes());
            put(&mut head, 24, &spec.uid.to_le_bytes());
            put(&mut head, 28, &spec.gid.to_le_bytes());
            put(&mut head, 32, &spec.mtime.to_le_bytes());
            put(&mut head, 40, &spec.nsec.to_le_bytes());
            put(&mut head, 44, &spec.nlink.to_le_bytes());
        } else {
            put(&mut head, 6, &(spec.nlink as u16).to_le_bytes());
            put(&mut head, 8, &(size as u32).to_le_bytes());
            put(&mut head, 24, &(spec.uid as u16).to_le_bytes());
            put(&mut head, 26, &(spec.gid as u16).to_le_bytes());
        }
        if icount > 0 {
            head.extend([0; 12]);
            head.extend(xattrs);
        }
        match body {
            Body::Inline(data) => {
                head.extend(&data[data.len().saturating_sub(1) / BLOCK * BLOCK..]);
            }
            Body::Chunks(chunks) => {
                head.resize(head.len().next_multiple_of(8), 0);
                for (blob, chunk, block) in chunks {
                    head.extend((*chunk as u16).to_le_bytes());
                    head.extend([blob + 1, (chunk >> 16) as u8]);
                    head.extend(block.to_le_bytes());
                }
            }
            _ => {}
        }
        head
    }

    /// A file of `size` bytes in chunks of its own in `blob`.
    pub fn file(&mut self, spec: &Spec, blob: usize, size: u64) -> u64 {
        let mut chunks = Vec::new();
        let mut left = size;
        while left > 0 {
            let len = left.min(self.chunk_size.into()) as u32;
            let (index, block) = self.chunk(blob, len, len);
            chunks.push((blob as u8, index, block));
            left -= u64::from(len);
        }
        self.inode(
            &Spec {
                size: Some(size),
                ..spec.clone()
            },
            &Body::Chunks(chunks),
        )
    }

    /// Writes the root directory (with "." and "..") and all tables; returns the image.
    pub fn finish(mut self, entries: &[(&[u8], u64, u8)]) -> Vec<u8> {
        let mut all = vec![(&b"."[..], ROOT, 2), (b"..", ROOT, 2)];
        all.extend(entries);
        let data = dir_data(&all);
        let block = self.blocks(&data);
        let head = self.head(
            &Spec {
                nlink: 2,
                ..Spec::extended(0o40755)
            },
            &Body::Plain(data),
            block,
        );
        put(&mut self.image, self.root_body, &head);

        let chunk_table = self.align(BLOCK);
        for (blob, chunks) in self.blobs.iter().enumerate() {
            for c in chunks {
                self.image.extend([c.digest; 32]);
                self.image.extend((blob as u32).to_le_bytes());
                self.image.extend(c.flags.to_le_bytes());
                self.image.extend(c.compressed_size.to_le_bytes());
                self.image.extend(c.uncompressed_size.to_le_bytes());
                self.image.extend(c.compressed_offset.to_le_bytes());
                self.image.extend(c.uncompressed_offset.to_le_bytes());
                self.image.extend(0u64.to_le_bytes());
                self.image.extend(c.index.to_le_bytes());
                self.image.extend(0u32.to_le_bytes());
            }
        }
        let chunk_table_size = self.image.len() - chunk_table;
        self.align(BLOCK);

        let image = &mut self.image;
        put(image, 1024, &0xe0f5_e1e2_u32.to_le_bytes());
        put(image, 1024 + 8, &0x4000_0000_u32.to_le_bytes());
        image[1024 + 12] = 12;
        put(image, 1024 + 14, &(ROOT as u16).to_le_bytes());
        put(image, 1024 + 16, &1u64.to_le_bytes());
        put(image, 1024 + 24, &1_700_000_000u64.to_le_bytes());
        put(image, 1024 + 32, &5u32.to_le_bytes());
        put(
            image,
            1024 + 40,
            &((self.meta / BLOCK) as u32).to_le_bytes(),
        );
        put(image, 1024 + 80, &0xcu32.to_le_bytes());
        put(image, 1024 + 86, &(self.blobs.len() as u16).to_le_bytes());
        put(image, 1024 + 88, &11u16.to_le_bytes());
        put(image, 1152, &0x184u64.to_le_bytes());
        put(image, 1152 + 8, &(self.blob_table as u64).to_le_bytes());
        put(
            image,
            1152 + 16,
            &(256 * self.blobs.len() as u32).to_le_bytes(),
        );
        put(image, 1152 + 20, &self.chunk_size.to_le_bytes());
        put(image, 1152 + 24, &(chunk_table as u64).to_le_bytes());
        put(image, 1152 + 32, &(chunk_table_size as u64).to_le_bytes());
        put(
            image,
            1152 + 40,
            &(self.prefetch_table as u64).to_le_bytes(),
        );
        put(
            image,
            1152 + 48,
            &(4 * self.prefetch.len() as u32).to_le_bytes(),
        );
        for (i, nid) in self.prefetch.iter().enumerate() {
            put(image, self.prefetch_table + 4 * i, &nid.to_le_bytes());
        }
        for (i, chunks) in self.blobs.iter().enumerate() {
            let id = format!("{i:064x}");
            let data = chunks
                .iter()
                .map(|c| c.compressed_offset.saturating_add(c.compressed_size.into()))
                .max();
            let space = chunks
                .iter()
                .map(|c| {
                    c.uncompressed_offset
                        .saturating_add(c.uncompressed_size.into())
                })
                .max();
            let space = space.unwrap_or(0).div_ceil(4096).saturating_mul(4096);
            put(image, 1408 + 128 * i, id.as_bytes());
            put(
                image,
                1408 + 128 * i + 64,
                &((space / 4096) as u32).to_le_bytes(),
            );
            let at = self.blob_table + 256 * i;
            put(image, at, id.as_bytes());
            put(image, at + 64, &(i as u32).to_le_bytes());
            put(image, at + 68, &self.chunk_size.to_le_bytes());
            put(image, at + 72, &(chunks.len() as u32).to_le_bytes());
            put(image, at + 76, &3u32.to_le_bytes());
            put(image, at + 84, &0x1u32.to_le_bytes());
            put(image, at + 88, &data.unwrap_or(0).to_le_bytes());
            put(image, at + 96, &space.to_le_bytes());
            put(image, at + 112, &data.unwrap_or(0).to_le_bytes());
            put(image, at + 120, &(16 * chunks.len() as u64).to_le_bytes());
            put(image, at + 128, &(16 * chunks.len() as u64).to_le_bytes());
        }
        self.image
    }
}

/// An image with one of everything, small enough to be damaged at each of its bytes.
pub fn sample() -> Vec<u8> {
    let mut b = Builder::new(4096, 2);
    let xattrs = vec![
        (1, b"comment".to_vec(), b"value".to_vec()),
        (6, b"capability".to_vec(), vec![1, 0, 0, 2]),
        (2, Vec::new(), vec![2, 0, 0, 0]),
    ];
    let big = b.file(
        &Spec {
            xattrs,
            ..Spec::extended(0o100755)
        },
        0,
        10_000,
    );
    let small = b.file(&Spec::new(0o100644), 1, 100);
    let link = b.inode(&Spec::new(0o120777), &Body::Inline(b"big/target".to_vec()));
    let plain = b.inode(&Spec::new(0o100600), &Body::Plain(vec![7; 5000]));
    let inline = b.inode(&Spec::new(0o100600), &Body::Inline(vec![8; 5000]));
    let device = b.inode(
        &Spec {
            rdev: 0x0501,
            ..Spec::new(0o20620)
        },
        &Body::None,
    );
    let fifo = b.inode(&Spec::new(0o10600), &Body::None);
    let entries: [(&[u8], u64, u8); 4] = [
        (b".", 0, 2),
        (b"..", ROOT, 2),
        (b"again", big, 1),
        (b"fifo", fifo, 5),
    ];
    let dir = b.inode(
        &Spec {
            nlink: 2,
            ..Spec::new(0o40750)
        },
        &Body::Inline(dir_data(&entries)),
    );
    b.prefetch = vec![big as u32, small as u32, 0];
    b.finish(&[
        (b"big", big, 1),
        (b"device", device, 3),
        (b"dir", dir, 2),
        (b"inline", inline, 1),
        (b"link", link, 7),
        (b"plain", plain, 1),
        (b"small", small, 1),
    ])
}

/// Calls every reader method on `image`, whatever it holds. Returns the number of items that were read.
pub fn read_everything(image: &[u8]) -> Result<u64, FormatError> {
    let tree = Tree::parse(image)?;
    let mut items = 0;
    let slots = (image.len() as u64 - tree.superblock().meta_offset) / 32;
    for nid in (0..=slots).chain([u64::MAX, 1 << 59, u64::MAX / 32]) {
        items += read_inode(&tree, nid);
    }
    items += tree.prefetch().count() as u64;
    let maps = ChunkTable::parse(&tree)?.into_maps();
    check_references(&tree, &maps)?;
    Ok(items)
}

fn read_inode(tree: &Tree<'_>, nid: Nid) -> u64 {
    let Ok(inode) = tree.inode(nid) else { return 0 };
    let limit = tree.image().len();
    let mut items = 1;
    for cookie in [0, 1, 3, 1 << 10, u64::MAX] {
        let names: Vec<_> = tree.entries(&inode, cookie).take(limit + 1).collect();
        assert!(names.len() <= limit, "more entries than bytes");
        for entry in names.into_iter().flatten() {
            items += 1;
            assert!(entry.next_cookie != 0);
            if cookie == 0 {
                let _ = tree.lookup(&inode, entry.name);
            }
        }
    }
    for name in [&b"big"[..], b"", b"a", b"zz", &[0xff; 300]] {
        let _ = tree.lookup(&inode, name);
    }
    let _ = tree.readlink(&inode);
    assert!(tree.xattrs(&inode).take(limit + 1).count() <= limit);
    let _ = tree.xattr_get(&inode, b"user.comment");
    for (offset, len) in [(0, u64::MAX), (4095, 2), (u64::MAX, u64::MAX)] {
        items += tree.chunks(&inode, offset, len).take(limit + 1).count() as u64;
        let _ = tree.inline_data(&inode, offset, len);
    }
    let _ = file_content(tree, &inode);
    items
}

/// Content of a file that lies in the bootstrap.
pub fn file_content(tree: &Tree<'_>, inode: &Inode) -> Result<Vec<u8>, FormatError> {
    let mut content = Vec::new();
    loop {
        let piece = tree.inline_data(inode, content.len() as u64, u64::MAX)?;
        if piece.is_empty() {
            return Ok(content);
        }
        content.extend(piece);
    }
}
