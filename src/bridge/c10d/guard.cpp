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
  } catch (const std::exception& error) {
    // Told apart here and not by catch clauses of their own: a clause's type is referred to from
    // the exception tables, which the linker keeps even where nothing calls the function, and
    // binaries that never touch a tensor would want libtorch.
    if (const auto* failure = dynamic_cast<const StoreFailure*>(&error)) {
      return note(failure->code(), failure->what_without_backtrace());
    }
    const auto* engine = dynamic_cast<const c10::Error*>(&error);
    const char* message = engine != nullptr ? engine->what_without_backtrace() : error.what();
    const bool memory = dynamic_cast<const c10::OutOfMemoryError*>(&error) != nullptr ||
        dynamic_cast<const std::bad_alloc*>(&error) != nullptr;
    // Timeouts and lost peers have no type of their own in c10d: Rust reads the message.
    return note(memory ? kOutOfMemory : kGeneric, message);
  } catch (...) {
    return note(kGeneric, "an exception that is no std::exception");
  }
}

} // namespace cpcr

extern "C" const char* cpcr_last_error() {
  return cpcr::last_error.c_str();
}
