//! What a caller's pointers mean: buffers, and handles to values that live here.

use std::ffi::c_void;

/// # Safety
/// `data` must be valid for reads of `len` elements; it may be null when `len` is 0.
pub(crate) unsafe fn input<'a, T>(data: *const T, len: usize) -> &'a [T] {
    if len == 0 {
        return &[];
    }
    // SAFETY: the caller promises `len` readable elements.
    unsafe { std::slice::from_raw_parts(data, len) }
}

/// # Safety
/// `data` must be valid for writes of `len` elements, which nobody else uses; it may be null when `len` is 0.
pub(crate) unsafe fn output<'a, T>(data: *mut T, len: usize) -> &'a mut [T] {
    if len == 0 {
        return &mut [];
    }
    // SAFETY: the caller promises `len` writable elements; plain integers need no initialisation by type.
    unsafe { std::slice::from_raw_parts_mut(data, len) }
}

/// Writes a handle of `value` to `out`; it lives until [`free`].
///
/// # Safety
/// `out` must be valid for one write.
pub(crate) unsafe fn hand_out<T>(value: T, out: *mut *mut c_void) {
    // SAFETY: promised by the caller.
    unsafe { out.write(Box::into_raw(Box::new(value)).cast()) };
}

/// Frees what is behind a handle. Null is allowed.
///
/// # Safety
/// `handle` must come from [`hand_out`] with the same type, and no other use of it may run or follow.
pub(crate) unsafe fn free<T>(handle: *mut c_void) {
    if !handle.is_null() {
        // SAFETY: the pointer came from Box::into_raw, and the caller promises that this is its last use.
        drop(unsafe { Box::from_raw(handle.cast::<T>()) });
    }
}
