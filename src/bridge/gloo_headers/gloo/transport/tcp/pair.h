// One connection of the TCP transport: the call by which a group is aborted. See ../../../README.md.
#pragma once
#include <string>

namespace gloo {
namespace transport {

class Pair;

namespace tcp {

class Pair {
 public:
  // Fails every pending operation of the connection with `message`, then closes it.
  void signalExceptionExternal(const std::string& message);
};

} // namespace tcp
} // namespace transport
} // namespace gloo
