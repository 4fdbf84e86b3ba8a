// The emulation's version of the instructions of Hopper: none yet.

#pragma once

#include "types.cuh"
