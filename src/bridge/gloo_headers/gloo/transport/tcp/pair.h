// One connection of the TCP transport: the call by which a group is aborted. See ../../../README.md.
#pragma once
#include <exception>
#include <string>

namespace gloo {
namespace transport {

class Pair;

namespace tcp {

class Pair {
 public:
  // Fails every pending operation of the connection with `message`, then closes it. The result
  // is what they fail with; its type is no part of the symbol's name, but of how it is called.
  std::exception_ptr signalExceptionExternal(const std::string& message);
};

} // namespace tcp
} // namespace transport
} // namespace gloo
