// Declared for the layout of c10d::ProcessGroupGloo only; see ../../README.md.
#pragma once
namespace gloo {
namespace transport {
class UnboundBuffer {
 public:
  virtual ~UnboundBuffer() = 0;
};
}  // namespace transport
}  // namespace gloo
