//! The few Avro primitives that our schemas use (Avro 1.12 specification, "Binary encoding").

use bytes::Bytes;

/// A value that cannot be decoded: what is wrong, and at which byte.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{what} (at byte {at})")]
pub struct Unreadable {
    pub at: usize,
    pub what: String,
}

impl Unreadable {
    pub fn new(at: usize, what: String) -> Self {
        Self { at, what }
    }
}

pub struct Writer(Vec<u8>);

impl Writer {
    pub fn with_capacity(bytes: usize) -> Self {
        Self(Vec::with_capacity(bytes))
    }

    pub fn into_bytes(self) -> Vec<u8> {
        self.0
    }

    pub fn raw(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }

    /// An unsigned LEB128, as inside delta-coded lists.
    pub fn unsigned(&mut self, mut value: u128) {
        while value >= 0x80 {
            self.0.push((value as u8) | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }

    pub fn long(&mut self, value: i64) {
        self.unsigned(u128::from(((value << 1) ^ (value >> 63)) as u64));
    }

    pub fn count(&mut self, value: u64) {
        self.long(i64::try_from(value).unwrap_or(i64::MAX));
    }

    pub fn boolean(&mut self, value: bool) {
        self.0.push(u8::from(value));
    }

    pub fn bytes(&mut self, value: &[u8]) {
        self.long(value.len() as i64);
        self.raw(value);
    }

    pub fn text(&mut self, value: &str) {
        self.bytes(value.as_bytes());
    }

    /// A union of null and something.
    pub fn option<T>(&mut self, value: Option<T>, write: impl FnOnce(&mut Self, T)) {
        match value {
            None => self.long(0),
            Some(value) => {
                self.long(1);
                write(self, value);
            }
        }
    }

    /// An array in one block.
    pub fn array<T>(&mut self, items: &[T], mut write: impl FnMut(&mut Self, &T)) {
        if !items.is_empty() {
            self.long(items.len() as i64);
            for item in items {
                write(self, item);
            }
        }
        self.long(0);
    }
}

/// Reads from shared bytes: byte fields are slices of the input, not copies.
pub struct Reader<'a> {
    input: &'a Bytes,
    at: usize,
}

impl<'a> Reader<'a> {
    pub fn new(input: &'a Bytes, at: usize) -> Self {
        Self { input, at }
    }

    pub fn fail<T>(&self, what: impl Into<String>) -> Result<T, Unreadable> {
        Err(Unreadable::new(self.at, what.into()))
    }

    pub fn finish(&self) -> Result<(), Unreadable> {
        match self.input.len() - self.at {
            0 => Ok(()),
            rest => self.fail(format!("{rest} bytes too many")),
        }
    }

    pub fn is_empty(&self) -> bool {
        self.at == self.input.len()
    }

    pub fn unsigned(&mut self) -> Result<u128, Unreadable> {
        let mut value = 0_u128;
        for shift in (0..128).step_by(7) {
            let Some(&byte) = self.input.get(self.at) else { return self.fail("ends inside a number") };
            self.at += 1;
            value |= u128::from(byte & 0x7F) << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        self.fail("a number is too long")
    }

    pub fn long(&mut self) -> Result<i64, Unreadable> {
        let Ok(raw) = u64::try_from(self.unsigned()?) else { return self.fail("a number is too large") };
        Ok(((raw >> 1) as i64) ^ -((raw & 1) as i64))
    }

    /// A number that is never negative and fits.
    pub fn count<T: TryFrom<i64>>(&mut self) -> Result<T, Unreadable> {
        let value = self.long()?;
        T::try_from(value).or_else(|_| self.fail(format!("{value} is out of range")))
    }

    pub fn boolean(&mut self) -> Result<bool, Unreadable> {
        match self.input.get(self.at) {
            Some(value @ (0 | 1)) => {
                self.at += 1;
                Ok(*value == 1)
            }
            _ => self.fail("not a boolean"),
        }
    }

    /// So many bytes as they are.
    pub fn array_of<const N: usize>(&mut self) -> Result<[u8; N], Unreadable> {
        let Some(found) = self.input[self.at..].first_chunk::<N>() else { return self.fail("ends too early") };
        self.at += N;
        Ok(*found)
    }

    pub fn bytes(&mut self) -> Result<Bytes, Unreadable> {
        let length: usize = self.count()?;
        if length > self.input.len() - self.at {
            return self.fail(format!("{length} bytes are announced, fewer are left"));
        }
        let value = self.input.slice(self.at..self.at + length);
        self.at += length;
        Ok(value)
    }

    pub fn str(&mut self) -> Result<&'a str, Unreadable> {
        let length: usize = self.count()?;
        let rest = &self.input[self.at..];
        if length > rest.len() {
            return self.fail(format!("{length} bytes are announced, fewer are left"));
        }
        match std::str::from_utf8(&rest[..length]) {
            Ok(text) => {
                self.at += length;
                Ok(text)
            }
            Err(_) => self.fail("text is not UTF-8"),
        }
    }

    pub fn text<T: From<&'a str>>(&mut self) -> Result<T, Unreadable> {
        Ok(self.str()?.into())
    }

    pub fn option<T>(
        &mut self,
        read: impl FnOnce(&mut Self) -> Result<T, Unreadable>,
    ) -> Result<Option<T>, Unreadable> {
        match self.long()? {
            0 => Ok(None),
            1 => read(self).map(Some),
            other => self.fail(format!("no branch {other} in a union of two")),
        }
    }

    pub fn array<T>(&mut self, mut read: impl FnMut(&mut Self) -> Result<T, Unreadable>) -> Result<Vec<T>, Unreadable> {
        let mut items = Vec::new();
        loop {
            let mut block = self.long()?;
            if block == 0 {
                return Ok(items);
            }
            if block < 0 {
                // A negative count is followed by the block's size, for those who skip it.
                self.long()?;
                block = block.saturating_neg();
            }
            for _ in 0..block {
                items.push(read(self)?);
            }
        }
    }

    pub fn symbol<T: Copy>(&mut self, symbols: &[T]) -> Result<T, Unreadable> {
        let index: usize = self.count()?;
        match symbols.get(index) {
            Some(symbol) => Ok(*symbol),
            None => self.fail(format!("no symbol {index} in the enum")),
        }
    }
}
