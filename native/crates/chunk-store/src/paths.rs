//! Names for node numbers, for reports: which file was it that made the guest wait?

use std::collections::{HashMap, HashSet};

use rafs_format::{FormatError, Nid, Tree};

/// Longest path that is followed, as Linux does: directories of a hostile image may be nested as deep as it is long.
const PATH_MAX: usize = 4096;

/// Paths of the nodes in `wanted`, by number; a node without a name in the tree is left out. Of several names
/// (hard links) the first in the order of the walk counts. Walks only as far as needed; a malformed part of the tree
/// ends it early.
pub fn paths(image: &[u8], wanted: &HashSet<Nid>) -> Result<HashMap<Nid, Vec<u8>>, FormatError> {
    let tree = Tree::parse(image)?;
    let mut found = HashMap::new();
    if wanted.contains(&tree.root()) {
        found.insert(tree.root(), b"/".to_vec());
    }
    let mut path = Vec::new();
    let mut seen = HashSet::from([tree.root()]);
    let mut levels = vec![(tree.entries(&tree.inode(tree.root())?, 0), 0)];
    // Names of a sound image are bytes of their own; directories of a hostile one share them.
    let mut left = image.len();
    while found.len() < wanted.len() {
        let Some((entries, path_len)) = levels.last_mut() else {
            break;
        };
        path.truncate(*path_len);
        let Some(entry) = entries.next() else {
            levels.pop();
            continue;
        };
        let entry = entry?;
        left = left.saturating_sub(1);
        if left == 0 {
            break;
        }
        if matches!(entry.name, b"." | b"..") {
            continue;
        }
        path.push(b'/');
        path.extend_from_slice(entry.name);
        if wanted.contains(&entry.nid) {
            found.entry(entry.nid).or_insert_with(|| path.clone());
        }
        let inode = tree.inode(entry.nid)?;
        if inode.is_dir() && path.len() < PATH_MAX && seen.insert(entry.nid) {
            levels.push((tree.entries(&inode, 0), path.len()));
        }
    }
    Ok(found)
}
