#include "guard.h"

#include <new>

namespace cpcr {
namespace {

thread_local std::string last_error;

int note(int code, const char* message) noexcept {
  try {
    last_error = message;
  } catch (...) {
    last_error.clear();
  }
  return code;
}

} // namespace

int note_current_exception() noexcept {
  try {
    throw;
  } catch (const StoreFailure& error) {
    return note(error.code(), error.what_without_backtrace());
  } catch (const c10::OutOfMemoryError& error) {
    return note(kOutOfMemory, error.what_without_backtrace());
  } catch (const c10::Error& error) {
    // Timeouts and lost peers have no type of their own in c10d: Rust reads the message.
    return note(kGeneric, error.what_without_backtrace());
  } catch (const std::bad_alloc& error) {
    return note(kOutOfMemory, error.what());
  } catch (const std::exception& error) {
    return note(kGeneric, error.what());
  } catch (...) {
    return note(kGeneric, "an exception that is no std::exception");
  }
}

} // namespace cpcr

extern "C" const char* cpcr_last_error() {
  return cpcr::last_error.c_str();
}
