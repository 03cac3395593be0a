// Every entry into C++ ends in a code, never in an exception that crosses into Rust.
//
// The codes mirror `bridge::error::Failure`; the message of the last failure is kept per thread.
#pragma once
#include <c10/util/Exception.h>

#include <string>
#include <utility>

namespace cpcr {

enum Code : int {
  kOk = 0,
  kGeneric = 1,
  kTimeout = 2,
  kPeerLost = 3,
  kAborted = 4,
  kOutOfMemory = 5,
};

// A failure of the key-value service, with the code that its Rust client chose.
class StoreFailure : public c10::DistStoreError {
 public:
  StoreFailure(int code, const std::string& message)
      : c10::DistStoreError({__func__, __FILE__, static_cast<uint32_t>(__LINE__)}, message), code_(code) {}
  int code() const noexcept {
    return code_;
  }

 private:
  int code_;
};

// Called inside a catch block: keeps the message, returns the code. Never throws.
int note_current_exception() noexcept;

// Runs `body`, turning whatever it throws into a code.
template <typename Body>
int guarded(Body&& body) noexcept {
  try {
    std::forward<Body>(body)();
    return kOk;
  } catch (...) {
    return note_current_exception();
  }
}

// Runs `body` with its exceptions swallowed: for destructors' sake.
template <typename Body>
void quietly(Body&& body) noexcept {
  try {
    std::forward<Body>(body)();
  } catch (...) {
    note_current_exception();
  }
}

} // namespace cpcr
