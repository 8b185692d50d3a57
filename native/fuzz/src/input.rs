//! Bytes of a fuzzer read as numbers and choices. Past the end everything is zero, so that every input means something.

/// What is left of an input.
pub struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    pub fn new(data: &'a [u8]) -> Input<'a> {
        Input(data)
    }

    /// Whether nothing is left.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Up to `n` bytes.
    pub fn bytes(&mut self, n: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(n.min(self.0.len()));
        self.0 = rest;
        taken
    }

    /// All that is left.
    pub fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.0)
    }

    fn number(&mut self, n: usize) -> u64 {
        let bytes = self.bytes(n);
        bytes
            .iter()
            .rev()
            .fold(0, |number, byte| number << 8 | u64::from(*byte))
    }

    pub fn u8(&mut self) -> u8 {
        self.number(1) as u8
    }

    pub fn u16(&mut self) -> u16 {
        self.number(2) as u16
    }

    pub fn u24(&mut self) -> u32 {
        self.number(3) as u32
    }

    pub fn u32(&mut self) -> u32 {
        self.number(4) as u32
    }

    pub fn u64(&mut self) -> u64 {
        self.number(8)
    }

    /// A number below `n` (from 1 to 65 536).
    pub fn below(&mut self, n: usize) -> usize {
        if n <= 256 {
            usize::from(self.u8()) % n
        } else {
            usize::from(self.u16()) % n
        }
    }

    /// One of `choices`.
    pub fn pick<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len())]
    }
}

/// Changes to `image` that the rest of an input describes. Most are small, so that what surrounds them goes on making
/// sense.
pub fn damage(input: &mut Input<'_>, image: &mut Vec<u8>) {
    while !input.is_empty() && !image.is_empty() {
        let kind = input.u8();
        let at = input.u24() as usize % image.len();
        match kind % 6 {
            0..3 => {
                let bytes = input.bytes(1 + usize::from(kind >> 4));
                let end = (at + bytes.len()).min(image.len());
                image[at..end].copy_from_slice(&bytes[..end - at]);
            }
            3 => {
                let (from, len) = (input.u24() as usize % image.len(), input.below(4096));
                let len = len.min(image.len() - from).min(image.len() - at);
                image.copy_within(from..from + len, at);
            }
            4 => {
                let byte = &mut image[at];
                *byte = byte.wrapping_add(input.u8());
            }
            // Lengths of whole blocks, because others are refused at once.
            _ => image.resize(at.next_multiple_of(4096), 0),
        }
    }
}

/// The input of [`damage`] that writes `bytes` (up to 16) at `at`.
pub fn write_at(at: usize, bytes: &[u8]) -> Vec<u8> {
    // The kind is 0, 1 or 2 modulo 6, the length less one stands above.
    let high = (bytes.len() as u8 - 1) << 4;
    let kind = (0..16).map(|low| high | low).find(|k| k % 6 < 3);
    let mut out = vec![kind.unwrap_or(0)];
    out.extend(&(at as u32).to_le_bytes()[..3]);
    out.extend(bytes);
    out
}
