// A device is made by libtorch and only carried about in a shared_ptr. See ../../README.md.
#pragma once

namespace gloo {
namespace transport {
class Device;
}
} // namespace gloo
