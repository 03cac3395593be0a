// Stands in for Gloo's header of this name. Nothing of it is needed. See ../../README.md.
#pragma once
