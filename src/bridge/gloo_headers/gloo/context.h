// Only what src/bridge calls by symbol; never constructed or laid out here. See ../README.md.
#pragma once
#include <chrono>
#include <memory>

#include <gloo/transport/unbound_buffer.h>

namespace gloo {
namespace transport {
class Pair;
}

class Context {
 public:
  std::unique_ptr<transport::Pair>& getPair(int rank);
  void setTimeout(std::chrono::milliseconds timeout);
};

} // namespace gloo
