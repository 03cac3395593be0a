// Declared for the layout of c10d::ProcessGroupGloo only; see ../../README.md.
#pragma once
#include <memory>
#include "gloo/transport/unbound_buffer.h"
namespace gloo {
namespace transport {
class Device {
 public:
  virtual ~Device() = 0;
};
}  // namespace transport
}  // namespace gloo
