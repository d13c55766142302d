//! Taking a request's body: never more of it, and never more of all of them, in memory than is allowed, and not for ever.

use std::io::Read;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use axum::body::{Body, BodyDataStream};
use axum::http::{HeaderMap, HeaderValue, header};
use bytes::{Bytes, BytesMut};
use flate2::read::{DeflateDecoder, MultiGzDecoder, ZlibDecoder};
use futures_util::StreamExt;
use tokio::sync::Semaphore;

use super::request::{MAX_BODY, Refusal};

/// Of a refused body so much is still taken; a client that sends more has to bear a broken connection.
const DISCARD: usize = 16 << 20;
/// And for so long: the answer waits for it.
const DISCARDING: Duration = Duration::from_secs(2);
/// Compressed bodies above it are inflated off the async threads: it would take longer than half a millisecond.
const LARGE: usize = 16 * 1024;
/// A decoder's window: what HTTP allows (RFC 9659), as a power of two. Brotli's is at most 16 MiB.
const ZSTD_WINDOW: u32 = 23;
/// Bodies that are inflated or parsed off the async threads at a time, at most: a decoder may hold a window of megabytes.
const WORKERS: usize = 8;
/// Bodies that are taken only to be thrown away, at a time.
const DISCARDS: usize = 64;

/// What bodies of requests under way may take together, from their first byte until their events are stored. It is also the first to
/// tell that the log is slow: then requests pile up, and what is no live traffic is turned away at half of it.
pub struct Intake {
    used: AtomicUsize,
    limit: usize,
    patience: Duration,
    workers: Arc<Semaphore>,
    discards: Semaphore,
}

/// Bytes that a request holds; given back when it is dropped.
pub struct Held {
    intake: Arc<Intake>,
    bytes: usize,
    limit: usize,
}

impl Drop for Held {
    fn drop(&mut self) {
        self.intake.used.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

impl Held {
    /// Takes so many bytes more.
    ///
    /// # Errors
    /// [`Refusal::Unavailable`] where there is no room for them now.
    pub fn grow(&mut self, bytes: usize) -> Result<(), Refusal> {
        let before = self.intake.used.fetch_add(bytes, Ordering::Relaxed);
        self.bytes += bytes;
        if before + bytes > self.limit { Err(Refusal::Unavailable) } else { Ok(()) }
    }
}

impl Intake {
    /// `limit` in bytes; a body has to be there within `patience`.
    pub fn new(limit: usize, patience: Duration) -> Arc<Self> {
        // Half of the cores: whoever sends large bodies, or small ones that are large inside, leaves the others to everybody else.
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let (workers, discards) = (Arc::new(Semaphore::new((cores / 2).clamp(1, WORKERS))), Semaphore::new(DISCARDS));
        Arc::new(Self { used: AtomicUsize::new(0), limit, patience, workers, discards })
    }

    /// Nothing yet, to be grown.
    pub fn hold(self: &Arc<Self>) -> Held {
        Held { intake: Arc::clone(self), bytes: 0, limit: self.limit }
    }

    /// The body, inflated where it is compressed, and the memory that it holds.
    ///
    /// # Errors
    /// A [`Refusal`]: too large, too slow, not readable, or no memory for it now.
    pub async fn take(
        self: &Arc<Self>,
        body: Body,
        headers: &HeaderMap,
        is_backfill: bool,
    ) -> Result<(Bytes, Held), Refusal> {
        let limit = if is_backfill { self.limit / 2 } else { self.limit };
        let mut held = Held { intake: Arc::clone(self), bytes: 0, limit };
        let encoding = match Encoding::of(headers) {
            Ok(encoding) => encoding,
            Err(refusal) => {
                self.discard(body).await;
                return Err(refusal);
            }
        };
        let mut chunks = body.into_data_stream();
        let whole =
            tokio::time::timeout(self.patience, gather(&mut chunks, &mut held)).await.unwrap_or(Err(Refusal::Slow));
        let raw = match whole {
            Ok(raw) => raw,
            Err(refusal) => {
                drop(held);
                if refusal != Refusal::Slow {
                    self.rest(chunks).await;
                }
                return Err(refusal);
            }
        };
        let Some(encoding) = encoding else { return Ok((raw, held)) };
        let (inflated, mut held) = match raw.len() <= LARGE && !encoding.has_window() {
            true => (encoding.inflate(&raw)?, held),
            false => self.work(held, move || encoding.inflate(&raw)).await?,
        };
        held.grow(inflated.len())?;
        Ok((inflated, held))
    }

    /// Works off the async threads, on a few bodies at a time. What a request holds stays held until the work has ended, also where
    /// its client has gone meanwhile.
    ///
    /// # Errors
    /// What the work says.
    pub async fn work<T: Send + 'static>(
        &self,
        held: Held,
        work: impl FnOnce() -> Result<T, Refusal> + Send + 'static,
    ) -> Result<(T, Held), Refusal> {
        let turn = Arc::clone(&self.workers).acquire_owned().await.map_err(|_| Refusal::Unavailable)?;
        let working = tokio::task::spawn_blocking(move || {
            let done = work();
            drop(turn);
            (done, held)
        });
        let (done, held) = working.await.map_err(|_| Refusal::Unavailable)?;
        Ok((done?, held))
    }

    /// Takes a body that nobody wants. A client that is still sending when the connection closes sees a broken connection in place of
    /// the answer, and sends everything again.
    pub async fn discard(&self, body: Body) {
        self.rest(body.into_data_stream()).await;
    }

    async fn rest(&self, mut rest: BodyDataStream) {
        let Ok(_turn) = self.discards.try_acquire() else { return };
        let mut left = DISCARD;
        let drained = async {
            while let Some(Ok(chunk)) = rest.next().await
                && left > chunk.len()
            {
                left -= chunk.len();
            }
        };
        let _ = tokio::time::timeout(DISCARDING, drained).await;
    }
}

async fn gather(chunks: &mut BodyDataStream, held: &mut Held) -> Result<Bytes, Refusal> {
    let mut first = Bytes::new();
    let mut raw = BytesMut::new();
    while let Some(chunk) = chunks.next().await {
        let chunk = chunk.map_err(|_| Refusal::UnreadableBody)?;
        if first.len() + raw.len() + chunk.len() > MAX_BODY {
            return Err(Refusal::TooLarge);
        }
        held.grow(chunk.len())?;
        // Most bodies come in one piece, which is kept as it is.
        if raw.is_empty() && first.is_empty() {
            first = chunk;
            continue;
        }
        raw.extend_from_slice(&std::mem::take(&mut first));
        raw.extend_from_slice(&chunk);
    }
    Ok(if raw.is_empty() { first } else { raw.freeze() })
}

/// A body of a known encoding, inflated.
///
/// # Errors
/// [`Refusal::UnknownEncoding`], [`Refusal::UnreadableBody`], or [`Refusal::TooLarge`] beyond [`MAX_BODY`].
pub fn inflated(encoding: &str, raw: &[u8]) -> Result<Bytes, Refusal> {
    match Encoding::named(encoding.as_bytes())? {
        Some(encoding) => encoding.inflate(raw),
        None => Ok(Bytes::copy_from_slice(raw)),
    }
}

/// How a body is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Encoding {
    Gzip,
    Deflate,
    Brotli,
    Zstd,
}

impl Encoding {
    fn of(headers: &HeaderMap) -> Result<Option<Self>, Refusal> {
        headers.get(header::CONTENT_ENCODING).map(HeaderValue::as_bytes).map_or(Ok(None), Self::named)
    }

    fn named(given: &[u8]) -> Result<Option<Self>, Refusal> {
        match given.trim_ascii().to_ascii_lowercase().as_slice() {
            b"" | b"identity" => Ok(None),
            b"gzip" | b"x-gzip" => Ok(Some(Encoding::Gzip)),
            b"deflate" => Ok(Some(Encoding::Deflate)),
            b"br" => Ok(Some(Encoding::Brotli)),
            b"zstd" => Ok(Some(Encoding::Zstd)),
            _ => Err(Refusal::UnknownEncoding),
        }
    }

    /// Its decoder may take megabytes, however small the body is.
    fn has_window(self) -> bool {
        matches!(self, Encoding::Brotli | Encoding::Zstd)
    }

    fn inflate(self, raw: &[u8]) -> Result<Bytes, Refusal> {
        match self {
            Encoding::Gzip => bounded(MultiGzDecoder::new(raw), raw.len()),
            // Some send it without the wrapping that the standard asks for.
            Encoding::Deflate if raw.first().is_some_and(|first| first & 0x0F == 8) => {
                bounded(ZlibDecoder::new(raw), raw.len())
            }
            Encoding::Deflate => bounded(DeflateDecoder::new(raw), raw.len()),
            Encoding::Brotli => bounded(brotli_decompressor::Decompressor::new(raw, 4096), raw.len()),
            Encoding::Zstd => {
                let mut decoder = zstd::Decoder::new(raw).map_err(|_| Refusal::UnreadableBody)?;
                decoder.window_log_max(ZSTD_WINDOW).map_err(|_| Refusal::UnreadableBody)?;
                bounded(decoder, raw.len())
            }
        }
    }
}

fn bounded(decoder: impl Read, raw: usize) -> Result<Bytes, Refusal> {
    let mut inflated = Vec::with_capacity((raw * 4).min(MAX_BODY));
    decoder.take(MAX_BODY as u64 + 1).read_to_end(&mut inflated).map_err(|_| Refusal::UnreadableBody)?;
    if inflated.len() > MAX_BODY { Err(Refusal::TooLarge) } else { Ok(inflated.into()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn encoded(encoding: &'static str) -> HeaderMap {
        HeaderMap::from_iter([(header::CONTENT_ENCODING, HeaderValue::from_static(encoding))])
    }

    fn compress(encoding: &str, text: &[u8]) -> Vec<u8> {
        let level = flate2::Compression::default();
        match encoding {
            "gzip" => {
                let mut encoder = flate2::write::GzEncoder::new(Vec::new(), level);
                encoder.write_all(text).expect("compressed");
                encoder.finish().expect("compressed")
            }
            "deflate" => {
                let mut encoder = flate2::write::ZlibEncoder::new(Vec::new(), level);
                encoder.write_all(text).expect("compressed");
                encoder.finish().expect("compressed")
            }
            "raw deflate" => {
                let mut encoder = flate2::write::DeflateEncoder::new(Vec::new(), level);
                encoder.write_all(text).expect("compressed");
                encoder.finish().expect("compressed")
            }
            "zstd" => zstd::encode_all(text, 19).expect("compressed"),
            other => panic!("{other}"),
        }
    }

    #[tokio::test]
    async fn each_encoding_is_inflated_and_bounded() {
        let intake = Intake::new(64 << 20, Duration::from_secs(5));
        let bomb = vec![b' '; 100 << 20];
        for (name, encoding) in [("gzip", "GZIP"), ("deflate", "deflate"), ("raw deflate", "deflate"), ("zstd", "zstd")]
        {
            let taken = intake.take(compress(name, b"{}").into(), &encoded(encoding), false).await;
            assert_eq!(taken.map(|(bytes, _)| bytes).ok().as_deref(), Some(&b"{}"[..]), "{name}");
            let taken = intake.take(compress(name, &bomb).into(), &encoded(encoding), false).await;
            assert_eq!(taken.err(), Some(Refusal::TooLarge), "{name}");
            let cut = compress(name, br#"{"userId":"somebody"}"#);
            let taken = intake.take(cut[..cut.len() / 2].to_vec().into(), &encoded(encoding), false).await;
            assert_eq!(taken.err(), Some(Refusal::UnreadableBody), "{name}");
        }
        // Made by another implementation: `{}`, and 100 MiB of blanks.
        let blanks = include_bytes!("../../../tests/fixtures/blanks.br");
        let small = [0x8B, 0x00, 0x80, 0x7B, 0x7D, 0x03];
        for (raw, result) in [
            (&small[..], Ok(Bytes::from_static(b"{}"))),
            (&small[..4], Err(Refusal::UnreadableBody)),
            (blanks, Err(Refusal::TooLarge)),
        ] {
            let taken = intake.take(raw.to_vec().into(), &encoded("br"), false).await;
            assert_eq!(taken.map(|(bytes, _)| bytes), result);
        }
        assert_eq!(intake.take("x".into(), &encoded("compress"), false).await.err(), Some(Refusal::UnknownEncoding));
        assert_eq!(intake.used.load(Ordering::Relaxed), 0, "everything was given back");
    }

    #[tokio::test]
    async fn backfill_is_turned_away_before_live_traffic() {
        let intake = Intake::new(1_000, Duration::from_secs(5));
        let body = || Body::from(vec![b'x'; 400]);
        let (_, _first) = intake.take(body(), &HeaderMap::new(), true).await.expect("room");
        assert_eq!(intake.take(body(), &HeaderMap::new(), true).await.err(), Some(Refusal::Unavailable));
        let (_, _second) = intake.take(body(), &HeaderMap::new(), false).await.expect("room");
        assert_eq!(intake.take(body(), &HeaderMap::new(), false).await.err(), Some(Refusal::Unavailable));
    }

    #[tokio::test]
    async fn a_body_that_does_not_come_is_not_waited_for() {
        let intake = Intake::new(1_000, Duration::from_millis(20));
        let never = Body::from_stream(futures_util::stream::pending::<Result<Bytes, std::io::Error>>());
        assert_eq!(intake.take(never, &HeaderMap::new(), false).await.err(), Some(Refusal::Slow));
    }
}
