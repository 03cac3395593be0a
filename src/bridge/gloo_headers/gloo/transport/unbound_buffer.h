// Held by c10d's SendWork and RecvWork, which nothing here constructs. See ../../README.md.
#pragma once

namespace gloo {
namespace transport {

class UnboundBuffer {
 public:
  virtual ~UnboundBuffer() = 0;
};

} // namespace transport
} // namespace gloo
