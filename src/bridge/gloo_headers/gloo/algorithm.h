// Stands in for Gloo's header of this name, which libtorch's ProcessGroupGloo.hpp includes but
// the wheel lacks. Nothing of it is needed. See ../README.md.
#pragma once
