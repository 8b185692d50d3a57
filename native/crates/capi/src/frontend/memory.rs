//! C ABI of the front-end's guest memory.

use std::ffi::c_void;
use std::os::fd::AsRawFd;

use frontend::Region;
use frontend::memory::new_file;

use super::{borrow, fill, input, invalid, kit, output};
use crate::guard;

/// Adds a region of guest memory at `gpa`, from `file_offset` of the file `fd` (duplicated), or of a new memfd
/// when `fd` is -1, then with huge pages if asked. `out` gets the region's user address and its descriptor, which
/// stays the front-end's.
///
/// # Safety
/// `h` is a live handle; `out` has 2 writable elements.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vr_frontend_region_add(
    h: *mut c_void,
    gpa: u64,
    size: u64,
    fd: i32,
    file_offset: u64,
    huge: u32,
    out: *mut u64,
) -> i64 {
    guard(|| {
        // SAFETY: the caller's promises.
        let (kit, out) = unsafe { (kit(h)?, output(out, 2)) };
        let file = if fd < 0 {
            new_file(file_offset.saturating_add(size), huge != 0)?
        } else {
            borrow(&[fd])?
                .first()
                .ok_or_else(|| invalid("no descriptor"))?
                .try_clone_to_owned()?
        };
        let region = kit.memory.add(Region::new(gpa, size, file, file_offset)?)?;
        fill(
            out,
            &[region.user_address(), region.file().as_raw_fd() as u64],
        );
        Ok(0)
    })
}

/// Removes the region that begins at `gpa`; it stays mapped while buffers in it are in use.
///
/// # Safety
/// `h` is a live handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vr_frontend_region_remove(h: *mut c_void, gpa: u64) -> i64 {
    guard(|| {
        // SAFETY: the caller's promise.
        unsafe { kit(h) }?.memory.remove(gpa)?;
        Ok(0)
    })
}

/// Allocates `len` bytes of guest memory from the region that begins at `region`, or from any when negative;
/// returns the guest-physical address. With `exact` ≥ 0 exactly there.
///
/// # Safety
/// `h` is a live handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vr_frontend_alloc(
    h: *mut c_void,
    len: u64,
    align: u64,
    region: i64,
    exact: i64,
) -> i64 {
    guard(|| {
        // SAFETY: the caller's promise.
        let kit = unsafe { kit(h) }?;
        let span = match u64::try_from(exact) {
            Ok(gpa) => kit.memory.alloc_at(gpa, len)?,
            Err(_) => kit
                .memory
                .alloc(len as usize, align as usize, u64::try_from(region).ok())?,
        };
        Ok(kit.keep(span) as i64)
    })
}

/// Gives back what [`vr_frontend_alloc`] returned.
///
/// # Safety
/// `h` is a live handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vr_frontend_dealloc(h: *mut c_void, gpa: u64) -> i64 {
    guard(|| {
        // SAFETY: the caller's promise.
        unsafe { kit(h) }?.release(gpa)?;
        Ok(0)
    })
}

/// Copies `bytes` into guest memory.
///
/// # Safety
/// `h` is a live handle; `bytes` has `len` readable bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vr_frontend_write(
    h: *mut c_void,
    gpa: u64,
    bytes: *const u8,
    len: usize,
) -> i64 {
    guard(|| {
        // SAFETY: the caller's promises.
        let (kit, bytes) = unsafe { (kit(h)?, input(bytes, len)) };
        kit.memory.write(gpa, bytes)?;
        Ok(0)
    })
}

/// Copies guest memory into `bytes`.
///
/// # Safety
/// `h` is a live handle; `bytes` has `len` writable bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vr_frontend_read(
    h: *mut c_void,
    gpa: u64,
    bytes: *mut u8,
    len: usize,
) -> i64 {
    guard(|| {
        // SAFETY: the caller's promises.
        let (kit, bytes) = unsafe { (kit(h)?, output(bytes, len)) };
        kit.memory.read(gpa, bytes)?;
        Ok(0)
    })
}
