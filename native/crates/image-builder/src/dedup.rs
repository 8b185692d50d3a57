//! Which chunk has which digest, in 8 bytes per chunk: 32 bits of the digest and the chunk's number. A hit is a
//! candidate only; who asks compares the whole digest, which lies in the spool of chunks.

/// Slots: 0 is empty, else `tag << 32 | number + 1`.
#[derive(Default)]
pub struct Tags {
    slots: Vec<u64>,
    used: usize,
}

fn tag(digest: &[u8; 32]) -> u32 {
    u32::from_le_bytes([digest[0], digest[1], digest[2], digest[3]])
}

impl Tags {
    /// The numbers of chunks that may have `digest`; the one that has it is among them.
    pub fn candidates(&self, digest: &[u8; 32]) -> impl Iterator<Item = u32> + use<'_> {
        let tag = tag(digest);
        let mask = self.slots.len().wrapping_sub(1);
        (0..self.slots.len())
            .map(move |i| self.slots[(tag as usize).wrapping_add(i) & mask])
            .take_while(|slot| *slot != 0)
            .filter(move |slot| (slot >> 32) as u32 == tag)
            .map(|slot| slot as u32 - 1)
    }

    /// Notes that chunk `number`, which is below `u32::MAX`, has `digest`.
    pub fn insert(&mut self, digest: &[u8; 32], number: u32) {
        if self.used * 4 >= self.slots.len() * 3 {
            let larger = vec![0; (self.slots.len() * 2).max(1024)];
            for slot in std::mem::replace(&mut self.slots, larger) {
                if slot != 0 {
                    self.put(slot);
                }
            }
        }
        self.put(u64::from(tag(digest)) << 32 | u64::from(number + 1));
        self.used += 1;
    }

    fn put(&mut self, slot: u64) {
        let mask = self.slots.len() - 1;
        let mut at = (slot >> 32) as usize & mask;
        while self.slots[at] != 0 {
            at = (at + 1) & mask;
        }
        self.slots[at] = slot;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_chunk_is_found_again() {
        let digest = |i: u32| *blake3::hash(&i.to_le_bytes()).as_bytes();
        let mut tags = Tags::default();
        assert_eq!(tags.candidates(&digest(0)).count(), 0);
        for i in 0..20_000 {
            tags.insert(&digest(i), i);
        }
        for i in 0..20_000 {
            assert!(tags.candidates(&digest(i)).any(|found| found == i));
        }
        let others: usize = (20_000..40_000)
            .map(|i| tags.candidates(&digest(i)).count())
            .sum();
        assert!(others < 5, "{others} false candidates");
    }

    #[test]
    fn equal_tags_stay_apart() {
        let mut tags = Tags::default();
        for i in 0..10 {
            let mut digest = [0xff; 32];
            digest[31] = i;
            tags.insert(&digest, u32::from(i));
        }
        assert_eq!(
            tags.candidates(&[0xff; 32]).collect::<Vec<_>>(),
            (0..10).collect::<Vec<_>>()
        );
        assert_eq!(tags.candidates(&[0; 32]).count(), 0);
    }
}
