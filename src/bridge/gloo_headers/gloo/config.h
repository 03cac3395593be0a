// Declared for the layout of c10d::ProcessGroupGloo only; see ../README.md.
#pragma once
