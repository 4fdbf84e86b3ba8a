// Names of types, and what every kernel may use. NVRTC compiles without headers of its own.

#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef int i32;

// An argument that is null where a launch does not bind it.
#define OPTIONAL

// The bits of a full warp.
#define WARP 32
#define WHOLE_WARP 0xffffffffu
