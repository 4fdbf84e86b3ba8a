// Tests of the emulated libraries themselves: self_test FOLDER [TEST], where the libraries are. Each test runs in a
// process of its own, as several of them set the environment or end in an abort.

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include <dlfcn.h>
#include <sys/wait.h>
#include <unistd.h>

typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;

static std::string folder;

static void *symbol(bool driver, const char *name) {
    static void *libraries[2];
    void *&library = libraries[driver];
    if (!library) library = dlopen((folder + (driver ? "/libcuda.so.1" : "/libnvrtc.so.12")).c_str(), RTLD_NOW);
    if (!library) {
        fprintf(stderr, "%s\n", dlerror());
        exit(1);
    }
    void *found = dlsym(library, name);
    if (!found) {
        fprintf(stderr, "no %s\n", name);
        exit(1);
    }
    return found;
}

static int failures = 0;

#define EXPECT(condition)                                                                                              \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            printf("  line %d: %s\n", __LINE__, #condition);                                                           \
            failures++;                                                                                                \
        }                                                                                                              \
    } while (0)

// Calls a function of the driver by name and gives its result.
template <typename... A> static int cu(const char *name, A... arguments) {
    return ((int (*)(A...))symbol(true, name))(arguments...);
}
template <typename... A> static int rtc(const char *name, A... arguments) {
    return ((int (*)(A...))symbol(false, name))(arguments...);
}

static void open_device() {
    int device;
    void *context;
    EXPECT(cu("cuInit", 0u) == 0);
    EXPECT(cu("cuDeviceGet", &device, 0) == 0);
    EXPECT(cu("cuDevicePrimaryCtxRetain", &context, device) == 0);
    EXPECT(cu("cuCtxSetCurrent", context) == 0);
}

static const char *TYPES = "#pragma once\n"
                           "typedef unsigned char u8; typedef unsigned short u16; typedef unsigned int u32;\n"
                           "typedef unsigned long long u64; typedef int i32;\n"
                           "#define OPTIONAL\n#define WARP 32\n#define WHOLE_WARP 0xffffffffu\n";

static std::string compile_log;

static int compile(const std::string &source, std::vector<const char *> options, std::string *image) {
    void *program = nullptr;
    const char *headers[] = {TYPES, "#error \"the emulation has its own\""};
    const char *names[] = {"types.cuh", "instructions.cuh"};
    EXPECT(rtc("nvrtcCreateProgram", &program, source.c_str(), "test.cu", 2, headers, names) == 0);
    int result = rtc("nvrtcCompileProgram", program, (int)options.size(), options.data());
    size_t size = 0;
    rtc("nvrtcGetProgramLogSize", program, &size);
    compile_log.resize(size);
    rtc("nvrtcGetProgramLog", program, &compile_log[0]);
    if (result == 0) {
        rtc("nvrtcGetCUBINSize", program, &size);
        image->resize(size);
        rtc("nvrtcGetCUBIN", program, &(*image)[0]);
        if (size == 0) {
            rtc("nvrtcGetPTXSize", program, &size);
            image->resize(size);
            rtc("nvrtcGetPTX", program, &(*image)[0]);
        }
    }
    rtc("nvrtcDestroyProgram", &program);
    return result;
}

static void *kernel(const std::string &source, const char *name, std::vector<const char *> options = {}) {
    options.push_back("--gpu-architecture=sm_90a");
    std::string image;
    int result = compile(source, options, &image);
    if (result) {
        printf("%s\n", compile_log.c_str());
        exit(1);
    }
    void *module = nullptr, *function = nullptr;
    EXPECT(cu("cuModuleLoadData", &module, (const void *)image.data()) == 0);
    EXPECT(cu("cuModuleGetFunction", &function, module, name) == 0);
    return function;
}

template <typename... A>
static int launch(void *function, u32 blocks, u32 threads, u32 dynamic, void *stream, A... arguments) {
    void *pointers[] = {&arguments..., nullptr};
    return cu("cuLaunchKernel", function, blocks, 1u, 1u, threads, 1u, 1u, dynamic, stream, (void **)pointers,
              (void **)nullptr);
}

template <typename T> struct Buffer {
    u64 address = 0;
    size_t count;
    explicit Buffer(size_t count) : count(count) { EXPECT(cu("cuMemAlloc_v2", &address, count * sizeof(T)) == 0); }
    explicit Buffer(const std::vector<T> &values) : Buffer(values.size()) {
        EXPECT(cu("cuMemcpyHtoD_v2", address, (const void *)values.data(), count * sizeof(T)) == 0);
    }
    ~Buffer() { EXPECT(cu("cuMemFree_v2", address) == 0); }
    std::vector<T> read() const {
        std::vector<T> values(count);
        EXPECT(cu("cuMemcpyDtoH_v2", (void *)values.data(), address, count * sizeof(T)) == 0);
        return values;
    }
};

// ---------------------------------------------------------------------------------------------------------------------

static void test_plain() {
    open_device();
    void *f = kernel(R"(
        extern "C" __global__ void __launch_bounds__(256) scale(
            const float *__restrict__ input, float *__restrict__ output, u32 count, float factor
        ) {
            u32 i = blockIdx.x * blockDim.x + threadIdx.x;
            if (i < count) output[i] = input[i] * factor + (float)gridDim.x;
        }
    )", "scale", {"-Du32=unsigned"});
    std::vector<float> values(100000);
    for (size_t i = 0; i < values.size(); i++) values[i] = (float)i;
    Buffer<float> input(values), output(values.size());
    EXPECT(std::isnan(output.read()[5])); // new memory is full of NaNs
    u32 blocks = (u32)(values.size() + 255) / 256;
    EXPECT(launch(f, blocks, 256, 0, nullptr, input.address, output.address, (u32)values.size(), 2.0f) == 0);
    std::vector<float> result = output.read();
    bool same = true;
    for (size_t i = 0; i < values.size(); i++) same &= result[i] == 2.0f * (float)i + (float)blocks;
    EXPECT(same);
    EXPECT(launch(f, 1, 512, 0, nullptr, input.address, output.address, 1u, 2.0f) == 1); // above __launch_bounds__
    EXPECT(launch(f, 0, 256, 0, nullptr, input.address, output.address, 1u, 2.0f) == 1);
}

static const char *REDUCE = R"(
    template <int N> __device__ __forceinline__ float block_sum(float value) {
        __shared__ float partial[N];
        __shared__ float total;
        for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
        if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = value;
    #ifndef NO_BARRIER
        __syncthreads();
    #endif
        if (threadIdx.x == 0) {
            float sum = 0.0f;
            for (int i = 0; i < N; i++) sum += partial[i];
            total = sum;
        }
        __syncthreads();
        return total;
    }

    extern "C" __global__ void __launch_bounds__(256) sums(const float *input, float *output, unsigned width) {
        float sum = 0.0f;
        for (unsigned i = threadIdx.x; i < width; i += 256) sum += input[(size_t)blockIdx.x * width + i];
        sum = block_sum<8>(sum);
        if (threadIdx.x == 0) output[blockIdx.x] = sum;
    }
)";

static bool sums_are_right(bool barrier) {
    void *f = barrier ? kernel(REDUCE, "sums") : kernel(REDUCE, "sums", {"-DNO_BARRIER"});
    u32 rows = 300, width = 1000;
    std::vector<float> values(rows * width);
    for (size_t i = 0; i < values.size(); i++) values[i] = (float)(i * 7919 % 13);
    Buffer<float> input(values), output(rows);
    EXPECT(launch(f, rows, 256, 0, nullptr, input.address, output.address, width) == 0);
    std::vector<float> result = output.read();
    bool same = true;
    for (u32 row = 0; row < rows; row++) {
        float sum = 0.0f;
        for (u32 i = 0; i < width; i++) sum += values[row * width + i];
        same &= result[row] == sum;
    }
    return same;
}

static void test_shared() {
    open_device();
    EXPECT(sums_are_right(true));
    EXPECT(!sums_are_right(false)); // the missing barrier shows
}

static void test_shuffles() {
    open_device();
    void *f = kernel(R"(
        extern "C" __global__ void shuffles(unsigned *output) {
            unsigned lane = threadIdx.x, *mine = output + threadIdx.x * 12;
            mine[0] = __shfl_sync(~0u, lane * 3, 5);
            mine[1] = __shfl_sync(~0u, lane * 3, 5, 8);
            mine[2] = __shfl_up_sync(~0u, lane, 3);
            mine[3] = __shfl_down_sync(~0u, lane, 3);
            mine[4] = __shfl_down_sync(~0u, lane, 3, 16);
            mine[5] = __shfl_xor_sync(~0u, lane, 9);
            mine[6] = __ballot_sync(~0u, lane % 3 == 0);
            mine[7] = __any_sync(~0u, lane == 17) + 2 * __all_sync(~0u, lane < 32) + 4 * __all_sync(~0u, lane < 31);
            mine[8] = (unsigned)(__shfl_sync(~0u, (unsigned long long)lane << 33, 31) >> 33);
            if (lane < 16) {
                mine[9] = __shfl_xor_sync(0xffffu, lane, 1);
            } else {
                mine[9] = __shfl_xor_sync(0xffff0000u, lane, 2);
            }
            mine[10] = (unsigned)__syncthreads_count(lane & 1) + 100 * __syncthreads_or(lane == 3) +
                       1000 * __syncthreads_and(lane != 3);
            mine[11] = __float_as_uint(__shfl_up_sync(~0u, (float)lane, 1, 4));
        }
    )", "shuffles");
    Buffer<u32> output(32 * 12);
    EXPECT(launch(f, 1, 32, 0, nullptr, output.address) == 0);
    std::vector<u32> result = output.read();
    for (u32 lane = 0; lane < 32; lane++) {
        const u32 *mine = result.data() + lane * 12;
        EXPECT(mine[0] == 15);
        EXPECT(mine[1] == (lane / 8 * 8 + 5) * 3);
        EXPECT(mine[2] == (lane < 3 ? lane : lane - 3));
        EXPECT(mine[3] == (lane + 3 < 32 ? lane + 3 : lane));
        EXPECT(mine[4] == (lane % 16 + 3 < 16 ? lane + 3 : lane));
        EXPECT(mine[5] == (lane ^ 9));
        EXPECT(mine[6] == 0x49249249u);
        EXPECT(mine[7] == 3);
        EXPECT(mine[8] == 31);
        EXPECT(mine[9] == (lane < 16 ? lane ^ 1 : lane ^ 2));
        EXPECT(mine[10] == 116);
        float up = lane % 4 ? (float)(lane - 1) : (float)lane;
        u32 bits;
        memcpy(&bits, &up, 4);
        EXPECT(mine[11] == bits);
    }
}

// A product of one tile: 16 x 16 by 16 x 8, once through fragments loaded by hand and once by ldmatrix.
static const char *MMA = R"(
    #include "instructions.cuh"

    extern "C" __global__ void tile(const float *a, const float *b, float *output) {
        __shared__ alignas(16) u16 left[16][16];
        __shared__ alignas(16) u16 right[16][8];  // k, n
        __shared__ alignas(16) u16 turned[8][16]; // n, k
        u32 lane = threadIdx.x;
        for (u32 i = lane; i < 256; i += 32) left[i / 16][i % 16] = OF(a[i]);
        for (u32 i = lane; i < 128; i += 32) {
            right[i / 8][i % 8] = OF(b[i]);
            turned[i % 8][i / 8] = OF(b[i]);
        }
        __syncwarp();
        u32 group = lane / 4, place = lane % 4 * 2;
        u32 x[4], y[2];
        x[0] = *(u32 *)&left[group][place], x[1] = *(u32 *)&left[group + 8][place];
        x[2] = *(u32 *)&left[group][place + 8], x[3] = *(u32 *)&left[group + 8][place + 8];
        y[0] = right[place][group] | (u32)right[place + 1][group] << 16;
        y[1] = right[place + 8][group] | (u32)right[place + 9][group] << 16;
        float d[4] = {1.0f, 1.0f, 1.0f, 1.0f};
        MMA(d, x, y);
        for (u32 i = 0; i < 4; i++) output[(group + i / 2 * 8) * 8 + place + i % 2] = d[i];

        ldmatrix_x4(x, &left[lane % 16][lane / 16 * 8]);
        u32 both[4];
        ldmatrix_x4_trans(both, lane < 16 ? (void *)&right[lane] : (void *)&turned[lane % 8][lane / 8 % 2 * 8]);
        u32 first[2] = {both[0], both[1]};
        float e[4] = {};
        MMA(e, x, first);
        for (u32 i = 0; i < 4; i++) output[128 + (group + i / 2 * 8) * 8 + place + i % 2] = e[i];

        ldmatrix_x4(both, &turned[lane % 8][lane / 8 % 2 * 8]);
        u32 second[2] = {both[0], both[1]};
        float f[4] = {};
        MMA(f, x, second);
        for (u32 i = 0; i < 4; i++) output[256 + (group + i / 2 * 8) * 8 + place + i % 2] = f[i];
    }
)";

static const char *MMA_TF32 = R"(
    #include "instructions.cuh"
    extern "C" __global__ void tile(const float *a, const float *b, float *output) {
        u32 lane = threadIdx.x, group = lane / 4, place = lane % 4;
        u32 x[4], y[2];
        for (u32 i = 0; i < 4; i++) x[i] = tf32_of(a[(group + i % 2 * 8) * 8 + place + i / 2 * 4]);
        for (u32 i = 0; i < 2; i++) y[i] = tf32_of(b[(place + i * 4) * 8 + group]);
        float d[4] = {};
        mma_tf32(d, x, y);
        for (u32 i = 0; i < 4; i++) output[(group + i / 2 * 8) * 8 + place * 2 + i % 2] = d[i];
    }
)";

static void test_mma() {
    open_device();
    std::vector<float> a(256), b(128);
    for (size_t i = 0; i < a.size(); i++) a[i] = (float)((int)(i * 37 % 23) - 11) / 8.0f;
    for (size_t i = 0; i < b.size(); i++) b[i] = (float)((int)(i * 53 % 19) - 9) / 4.0f;
    Buffer<float> left(a), right(b);
    for (int kind = 0; kind < 2; kind++) {
        void *f = kind ? kernel(MMA, "tile", {"-DOF=bf16_of", "-DMMA=mma_bf16"})
                       : kernel(MMA, "tile", {"-DOF=f16_of", "-DMMA=mma_f16"});
        Buffer<float> output(384);
        EXPECT(launch(f, 1, 32, 0, nullptr, left.address, right.address, output.address) == 0);
        std::vector<float> result = output.read();
        for (int i = 0; i < 16; i++) {
            for (int j = 0; j < 8; j++) {
                float sum = 0.0f;
                for (int k = 0; k < 16; k++) sum += a[i * 16 + k] * b[k * 8 + j];
                EXPECT(result[i * 8 + j] == sum + 1.0f);
                EXPECT(result[128 + i * 8 + j] == sum);
                EXPECT(result[256 + i * 8 + j] == sum);
            }
        }
    }
    void *f = kernel(MMA_TF32, "tile");
    Buffer<float> output(128);
    EXPECT(launch(f, 1, 32, 0, nullptr, left.address, right.address, output.address) == 0);
    std::vector<float> result = output.read();
    for (int i = 0; i < 16; i++) {
        for (int j = 0; j < 8; j++) {
            float sum = 0.0f;
            for (int k = 0; k < 8; k++) sum += a[i * 8 + k] * b[k * 8 + j];
            EXPECT(result[i * 8 + j] == sum);
        }
    }
    // Older devices lack the instructions.
    std::string image;
    EXPECT(compile(MMA_TF32, {"--gpu-architecture=sm_75"}, &image) == 6);
}

static void test_halves() {
    open_device();
    void *f = kernel(R"(
        #include "instructions.cuh"
        extern "C" __global__ void convert(const float *input, u32 *output, float *back) {
            u32 i = threadIdx.x;
            output[i * 3] = f16_of(input[i]);
            output[i * 3 + 1] = bf16_of(input[i]);
            output[i * 3 + 2] = tf32_of(input[i]);
            back[i * 2] = of_f16(f16_of(input[i]));
            back[i * 2 + 1] = of_bf16(bf16_of(input[i]));
        }
    )", "convert");
    struct Row {
        float value;
        u32 f16, bf16;
        float back;
    };
    const Row rows[] = {
        {0.0f, 0, 0, 0.0f},
        {-0.0f, 0x8000, 0x8000, -0.0f},
        {1.0f, 0x3c00, 0x3f80, 1.0f},
        {-2.5f, 0xc100, 0xc020, -2.5f},
        {65504.0f, 0x7bff, 0x4780, 65504.0f},
        {65519.0f, 0x7bff, 0x4780, 65504.0f},
        {65520.0f, 0x7c00, 0x4780, INFINITY},
        {1e10f, 0x7c00, 0x5015, INFINITY},
        {-INFINITY, 0xfc00, 0xff80, -INFINITY},
        {NAN, 0x7fff, 0x7fff, NAN},
        {5.9604645e-8f, 0x0001, 0x3380, 5.9604645e-8f},
        {2.9802322e-8f, 0x0000, 0x3300, 0.0f},
        {2.9802326e-8f, 0x0001, 0x3300, 5.9604645e-8f},
        {6.1035156e-5f, 0x0400, 0x3880, 6.1035156e-5f},
        {1.00048828125f, 0x3c00, 0x3f80, 1.0f},
        {1.00146484375f, 0x3c02, 0x3f80, 1.001953125f},
        {1.00390625f, 0x3c04, 0x3f80, 1.00390625f},
        {1.01171875f, 0x3c0c, 0x3f82, 1.01171875f},
    };
    const size_t count = sizeof(rows) / sizeof(*rows);
    std::vector<float> values;
    for (const Row &row : rows) values.push_back(row.value);
    Buffer<float> input(values), back(count * 2);
    Buffer<u32> output(count * 3);
    EXPECT(launch(f, 1, (u32)count, 0, nullptr, input.address, output.address, back.address) == 0);
    std::vector<u32> result = output.read();
    std::vector<float> again = back.read();
    for (size_t i = 0; i < count; i++) {
        EXPECT(result[i * 3] == rows[i].f16);
        EXPECT(result[i * 3 + 1] == rows[i].bf16);
        EXPECT(!memcmp(&again[i * 2], &rows[i].back, 4) || (std::isnan(again[i * 2]) && std::isnan(rows[i].back)));
    }
}

static void test_dynamic() {
    open_device();
    void *f = kernel(R"(
        extern "C" __global__ void reverse(float *values) {
            extern __shared__ float4 dynamic[]; // "extern __shared__ int commented[];"
            float *line = reinterpret_cast<float *>(dynamic);
            unsigned i = threadIdx.x, n = blockDim.x;
            values[n + i] = line[n * 16 + i];
            line[i] = values[i];
            __syncthreads();
            values[i] = line[n - 1 - i];
        }
    )", "reverse");
    std::vector<float> values(512);
    for (size_t i = 0; i < values.size(); i++) values[i] = (float)i;
    Buffer<float> buffer(values);
    EXPECT(launch(f, 1, 256, 256 * 17 * 4, nullptr, buffer.address) == 0);
    std::vector<float> result = buffer.read();
    bool right = true;
    for (u32 i = 0; i < 256; i++) right &= result[i] == (float)(255 - i) && std::isnan(result[256 + i]);
    EXPECT(right);
    EXPECT(launch(f, 1, 256, 100 << 10, nullptr, buffer.address) == 1); // not allowed yet
    EXPECT(cu("cuFuncSetAttribute", f, 8, 228 << 10) == 1);
    EXPECT(cu("cuFuncSetAttribute", f, 8, 227 << 10) == 0);
    EXPECT(launch(f, 1, 256, 227 << 10, nullptr, buffer.address) == 0);
    std::string image;
    EXPECT(compile("extern \"C\" __global__ void k(float *p) { __shared__ float a[13000]; a[threadIdx.x] = 1;"
                   "__syncthreads(); *p = a[5]; }", {"-arch=sm_80"}, &image) == 6);
    EXPECT(compile_log.find("too much shared data") != std::string::npos);
}

static const char *COPIES = R"(
    #include "instructions.cuh"
    extern "C" __global__ void copies(const float *input, float *output, u32 tiles) {
        __shared__ alignas(16) float tile[2][1024];
        u32 i = threadIdx.x;
        float sum = 0.0f;
        cp_async_16(&tile[0][i * 4], input + i * 4, true);
        cp_async_commit();
        for (u32 t = 0; t < tiles; t++) {
            if (t + 1 < tiles) cp_async_16(&tile[(t + 1) % 2][i * 4], input + (t + 1) * 1024 + i * 4, true);
            cp_async_commit();
    #ifndef NO_WAIT
            cp_async_wait<1>();
    #endif
            __syncthreads();
            for (u32 j = 0; j < 4; j++) sum += tile[t % 2][(i * 4 + j * 257) % 1024];
    #ifndef NO_BARRIER
            __syncthreads();
    #endif
        }
        cp_async_16(&tile[0][i * 4], nullptr, false);
        cp_async_commit();
        cp_async_wait<0>();
        output[blockIdx.x * 256 + i] = sum + tile[0][i * 4 + 3];
    }
)";

static bool copies_are_right(std::vector<const char *> options) {
    void *f = kernel(COPIES, "copies", options);
    u32 tiles = 5, blocks = 8;
    std::vector<float> values(tiles * 1024);
    for (size_t i = 0; i < values.size(); i++) values[i] = (float)(i % 1000);
    Buffer<float> input(values), output(256 * blocks);
    EXPECT(launch(f, blocks, 256, 0, nullptr, input.address, output.address, tiles) == 0);
    std::vector<float> result = output.read();
    bool right = true;
    for (u32 i = 0; i < 256 * blocks; i++) {
        float sum = 0.0f;
        for (u32 t = 0; t < tiles; t++) {
            for (u32 j = 0; j < 4; j++) sum += values[t * 1024 + (i % 256 * 4 + j * 257) % 1024];
        }
        right &= result[i] == sum;
    }
    return right;
}

static void test_copies() {
    open_device();
    EXPECT(copies_are_right({}));
    EXPECT(!copies_are_right({"-DNO_WAIT"}));
    EXPECT(!copies_are_right({"-DNO_BARRIER"}));
}

static void test_graph() {
    open_device();
    void *f = kernel("extern \"C\" __global__ void add(float *x, float y) { x[threadIdx.x] += y; }", "add");
    void *stream = nullptr, *other = nullptr, *event = nullptr, *joined = nullptr, *graph = nullptr, *exec = nullptr;
    EXPECT(cu("cuStreamCreate", &stream, 1u) == 0);
    EXPECT(cu("cuStreamCreate", &other, 1u) == 0);
    EXPECT(cu("cuEventCreate", &event, 0u) == 0);
    EXPECT(cu("cuEventCreate", &joined, 0u) == 0);
    std::vector<float> values(32, 1.0f), result(32);
    Buffer<float> buffer(values), target(32);
    EXPECT(cu("cuStreamBeginCapture_v2", stream, 0) == 0);
    int status = 0;
    EXPECT(cu("cuStreamIsCapturing", stream, &status) == 0 && status == 1);
    EXPECT(cu("cuMemsetD32Async", buffer.address, 0x40000000u, (size_t)16, stream) == 0); // 2.0
    EXPECT(launch(f, 1, 32, 0, stream, buffer.address, 5.0f) == 0);
    EXPECT(cu("cuEventRecord", event, stream) == 0);
    EXPECT(cu("cuStreamWaitEvent", other, event, 0u) == 0);
    EXPECT(cu("cuMemcpyDtoDAsync_v2", target.address, buffer.address, (size_t)128, other) == 0);
    EXPECT(cu("cuEventRecord", joined, other) == 0);
    EXPECT(cu("cuStreamWaitEvent", stream, joined, 0u) == 0);
    EXPECT(launch(f, 1, 32, 0, stream, buffer.address, 1.0f) == 0);
    EXPECT(cu("cuStreamEndCapture", stream, &graph) == 0);
    EXPECT(buffer.read()[20] == 1.0f); // nothing has run
    EXPECT(cu("cuGraphInstantiateWithFlags", &exec, graph, 0ull) == 0);
    EXPECT(cu("cuGraphDestroy", graph) == 0);
    EXPECT(cu("cuGraphLaunch", exec, stream) == 0);
    EXPECT(cu("cuGraphLaunch", exec, stream) == 0);
    EXPECT(cu("cuStreamSynchronize", stream) == 0);
    result = buffer.read();
    EXPECT(result[3] == 8.0f && result[20] == 13.0f);
    result = target.read();
    EXPECT(result[3] == 7.0f && result[20] == 12.0f);
    EXPECT(cu("cuGraphExecDestroy", exec) == 0);

    // What may not be done in a capture
    EXPECT(cu("cuStreamBeginCapture_v2", stream, 0) == 0);
    EXPECT(cu("cuStreamSynchronize", stream) == 900);
    EXPECT(launch(f, 1, 32, 0, stream, buffer.address, 1.0f) == 901);
    EXPECT(cu("cuStreamEndCapture", stream, &graph) == 901 && graph == nullptr);
    EXPECT(cu("cuStreamBeginCapture_v2", stream, 1) == 0);
    u64 address = 0;
    EXPECT(cu("cuMemAlloc_v2", &address, (size_t)16) == 900);
    EXPECT(cu("cuStreamEndCapture", stream, &graph) == 901);
    EXPECT(cu("cuEventRecord", event, other) == 0);
    EXPECT(cu("cuStreamBeginCapture_v2", stream, 0) == 0);
    EXPECT(cu("cuStreamWaitEvent", stream, event, 0u) == 905);
    EXPECT(cu("cuStreamEndCapture", stream, &graph) == 901);
    EXPECT(cu("cuStreamBeginCapture_v2", stream, 0) == 0);
    EXPECT(cu("cuEventRecord", event, stream) == 0);
    EXPECT(cu("cuStreamWaitEvent", other, event, 0u) == 0);
    EXPECT(launch(f, 1, 32, 0, other, buffer.address, 1.0f) == 0);
    EXPECT(cu("cuStreamEndCapture", stream, &graph) == 904);
    EXPECT(cu("cuEventQuery", event) == 907);
    float milliseconds = -1.0f;
    EXPECT(cu("cuEventRecord", event, stream) == 0);
    EXPECT(cu("cuEventRecord", joined, stream) == 0);
    EXPECT(cu("cuEventElapsedTime", &milliseconds, event, joined) == 0 && milliseconds >= 0.0f);
    EXPECT(cu("cuStreamDestroy_v2", stream) == 0);
    EXPECT(cu("cuStreamDestroy_v2", stream) == 400);
}

static void test_memory() {
    setenv("NEARFAR_EMULATED_MEMORY", "1000000", 1);
    open_device();
    u64 a = 0, b = 0;
    EXPECT(cu("cuMemAlloc_v2", &a, (size_t)600000) == 0 && a % 256 == 0);
    EXPECT(cu("cuMemAlloc_v2", &b, (size_t)600000) == 2);
    size_t available = 0, total = 0;
    EXPECT(cu("cuMemGetInfo_v2", &available, &total) == 0 && available == 400000 && total == 1000000);
    EXPECT(cu("cuMemsetD8_v2", a, (unsigned char)1, (size_t)600001) == 1);
    EXPECT(cu("cuMemsetD32_v2", a, 7u, (size_t)150000) == 0);
    u32 value = 0;
    EXPECT(cu("cuMemcpyDtoH_v2", (void *)&value, a + 599996, (size_t)4) == 0 && value == 7);
    EXPECT(cu("cuMemcpyDtoH_v2", (void *)&value, a + 599997, (size_t)4) == 1);
    EXPECT(cu("cuMemFree_v2", a + 256) == 1);
    EXPECT(cu("cuMemFree_v2", a) == 0);
    EXPECT(cu("cuMemFree_v2", a) == 1);
    EXPECT(cu("cuMemAllocAsync", &b, (size_t)1000000, (void *)nullptr) == 0);
    EXPECT(cu("cuMemFreeAsync", b, (void *)nullptr) == 0);
    int status = -1;
    std::thread([&] { status = cu("cuMemAlloc_v2", &a, (size_t)16); }).join();
    EXPECT(status == 201); // no context in that thread
}

static void test_compiler() {
    open_device();
    std::string image;
    EXPECT(compile("#include \"types.cuh\"\n\nextern \"C\" __global__ void k(float *p) { *p = wrong; }\n",
                   {"--gpu-architecture=sm_80"}, &image) == 6);
    EXPECT(compile_log.find("test.cu:3") != std::string::npos);
    EXPECT(compile_log.find("wrong") != std::string::npos);
    EXPECT(compile("", {"--gpu-architecture=sm_7"}, &image) == 5);
    EXPECT(compile("", {"--no-such-option"}, &image) == 5);
    const char *source = "extern \"C\" __global__ void k(int *p) { *p = __CUDA_ARCH__; }";
    void *module = nullptr, *function = nullptr;
    EXPECT(compile(source, {"-arch=sm_80"}, &image) == 0);
    EXPECT(cu("cuModuleLoadData", &module, (const void *)image.data()) == 209); // the device is 9.0
    EXPECT(compile(source, {"-arch=compute_80"}, &image) == 0);                 // PTX
    EXPECT(cu("cuModuleLoadData", &module, (const void *)image.data()) == 0);
    EXPECT(cu("cuModuleGetFunction", &function, module, "absent") == 500);
    EXPECT(cu("cuModuleGetFunction", &function, module, "k") == 0);
    Buffer<int> value(1);
    EXPECT(launch(function, 1, 1, 0, nullptr, value.address) == 0 && value.read()[0] == 800);
    EXPECT(cu("cuModuleUnload", module) == 0);
    EXPECT(cu("cuModuleLoadData", &module, (const void *)"rubbish, and a bit more of it") == 200);
}

static void test_lost() {
    setenv("NEARFAR_EMULATED_FAILURE", "launch:2", 1);
    open_device();
    void *f = kernel("extern \"C\" __global__ void k() {}", "k");
    EXPECT(launch(f, 1, 1, 0, nullptr) == 0);
    EXPECT(cu("cuCtxSynchronize") == 0);
    EXPECT(launch(f, 1, 1, 0, nullptr) == 700);
    EXPECT(cu("cuCtxSynchronize") == 700);
    u64 address = 0;
    EXPECT(cu("cuMemAlloc_v2", &address, (size_t)16) == 700);
}

static void test_no_device() {
    setenv("NEARFAR_EMULATED_DEVICES", "0", 1);
    int count = -1;
    EXPECT(cu("cuInit", 0u) == 100);
    EXPECT(cu("cuDeviceGetCount", &count) == 0 && count == 0);
}

static void test_architecture() {
    setenv("NEARFAR_EMULATED_ARCHITECTURE", "7.5", 1);
    setenv("NEARFAR_EMULATED_MULTIPROCESSORS", "40", 1);
    open_device();
    int value = 0;
    EXPECT(cu("cuDeviceGetAttribute", &value, 75, 0) == 0 && value == 7);
    EXPECT(cu("cuDeviceGetAttribute", &value, 76, 0) == 0 && value == 5);
    EXPECT(cu("cuDeviceGetAttribute", &value, 16, 0) == 0 && value == 40);
    EXPECT(cu("cuDeviceGetAttribute", &value, 97, 0) == 0 && value == 64 << 10);
}

// Many small and large blocks, some with threads that end early, to see that fibers are reused well.
static void test_many() {
    open_device();
    void *f = kernel(R"(
        extern "C" __global__ void many(unsigned *output, unsigned rounds) {
            __shared__ unsigned values[1024];
            unsigned i = threadIdx.x, n = blockDim.x, sum = 0;
            for (unsigned r = 0; r < rounds; r++) {
                values[i] = i * r + blockIdx.x;
                __syncthreads();
                sum += values[(i + r) % n];
                __syncthreads();
            }
            output[blockIdx.x * n + i] = sum;
        }
    )", "many");
    for (u32 threads : {1u, 31u, 33u, 256u, 1000u, 1024u}) {
        u32 blocks = 50, rounds = 7;
        Buffer<u32> output(threads * blocks);
        EXPECT(launch(f, blocks, threads, 0, nullptr, output.address, rounds) == 0);
        std::vector<u32> result = output.read();
        bool right = true;
        for (u32 b = 0; b < blocks; b++) {
            for (u32 i = 0; i < threads; i++) {
                u32 sum = 0;
                for (u32 r = 0; r < rounds; r++) sum += (i + r) % threads * r + b;
                right &= result[b * threads + i] == sum;
            }
        }
        EXPECT(right);
    }
}

static void test_allocations() {
    setenv("NEARFAR_EMULATED_FAILURE", "allocation:2", 1);
    open_device();
    u64 a = 0, b = 0;
    EXPECT(cu("cuMemAlloc_v2", &a, (size_t)16) == 0);
    EXPECT(cu("cuMemAlloc_v2", &b, (size_t)16) == 2);
    EXPECT(cu("cuMemAlloc_v2", &b, (size_t)16) == 0);
    void *host = nullptr;
    EXPECT(cu("cuMemHostAlloc", &host, (size_t)100, 0u) == 0);
    unsigned kind = 0;
    EXPECT(cu("cuPointerGetAttribute", (void *)&kind, 2, (u64)host) == 0 && kind == 1);
    EXPECT(cu("cuPointerGetAttribute", (void *)&kind, 2, a + 5) == 0 && kind == 2);
    EXPECT(cu("cuPointerGetAttribute", (void *)&kind, 2, (u64)&kind) == 1);
    EXPECT(cu("cuMemFreeHost", host) == 0);
}

// Several threads of the host compile, load and launch at once.
static void test_threads() {
    open_device();
    void *context = nullptr;
    EXPECT(cu("cuCtxGetCurrent", &context) == 0);
    std::vector<std::thread> threads;
    std::vector<int> right(6);
    for (int t = 0; t < 6; t++) {
        threads.emplace_back([t, context, &right] {
            EXPECT(cu("cuCtxSetCurrent", context) == 0);
            std::string number = "-DNUMBER=" + std::to_string(t);
            void *f = kernel("extern \"C\" __global__ void add(unsigned *p, unsigned n) { __shared__ unsigned a[256];\n"
                             "a[threadIdx.x] = n; __syncthreads();\n"
                             "p[blockIdx.x * 256 + threadIdx.x] += NUMBER + a[255 - threadIdx.x]; }",
                             "add", {number.c_str()});
            void *stream = nullptr;
            EXPECT(cu("cuStreamCreate", &stream, 1u) == 0);
            Buffer<u32> buffer(256 * 20);
            EXPECT(cu("cuMemsetD32Async", buffer.address, 0u, (size_t)256 * 20, stream) == 0);
            u32 sum = 0;
            for (u32 i = 0; i < 100; i++) {
                EXPECT(launch(f, 20, 256, 0, stream, buffer.address, i) == 0);
                sum += (u32)t + i;
            }
            bool same = true;
            for (u32 value : buffer.read()) same &= value == sum;
            right[(size_t)t] = same;
        });
    }
    for (std::thread &thread : threads) thread.join();
    for (int same : right) EXPECT(same);
}

static void test_clusters() {
    open_device();
    void *f = kernel("extern \"C\" __global__ void k(unsigned *p) { p[blockIdx.x] = gridDim.x; }", "k");
    struct Attribute {
        u32 id, pad;
        u32 value[16];
    } attribute = {4, 0, {2, 1, 1}};
    struct Configuration {
        u32 grid[3], threads[3], dynamic;
        void *stream;
        Attribute *attributes;
        u32 count;
    } configuration = {{6, 1, 1}, {1, 1, 1}, 0, nullptr, &attribute, 1};
    Buffer<u32> buffer(6);
    void *arguments[] = {&buffer.address};
    EXPECT(cu("cuLaunchKernelEx", (const void *)&configuration, f, (void **)arguments, (void **)nullptr) == 0);
    EXPECT(buffer.read()[5] == 6);
    configuration.grid[0] = 5;
    EXPECT(cu("cuLaunchKernelEx", (const void *)&configuration, f, (void **)arguments, (void **)nullptr) == 1);

    struct alignas(64) Map {
        u64 words[16];
    } map;
    u64 dimensions[] = {100, 50}, strides[] = {208}, wrong[] = {200};
    u32 box[] = {64, 32}, steps[] = {1, 1}, wide[] = {128, 32};
    auto encode = [&](const u64 *stride, const u32 *size) {
        return cu("cuTensorMapEncodeTiled", (void *)&map, 9, 2u, (void *)buffer.address, (const u64 *)dimensions,
                  stride, size, (const u32 *)steps, 0, 3, 0, 0);
    };
    EXPECT(encode(strides, box) == 0);
    EXPECT(encode(wrong, box) == 1);
    EXPECT(encode(strides, wide) == 1); // 256 bytes are more than the 128 of the swizzle
}

// Tests that are to end in a message.

static void die_deadlock() {
    open_device();
    void *f = kernel("extern \"C\" __global__ void stuck() {\n if (threadIdx.x < 7) return;\n __syncthreads();\n}",
                     "stuck");
    launch(f, 4, 64, 0, nullptr);
}

static void die_barriers() {
    open_device();
    void *f = kernel("extern \"C\" __global__ void two() {\n if (threadIdx.x < 32)\n __syncthreads();\n else\n"
                     "__syncthreads();\n}", "two");
    launch(f, 1, 64, 0, nullptr);
}

static void die_warp() {
    open_device();
    void *f = kernel("extern \"C\" __global__ void lanes(int *p) {\n if (threadIdx.x % 2)\n __syncwarp();\n else\n"
                     "*p = __any_sync(~0u, 1);\n}", "lanes");
    Buffer<int> buffer(1);
    launch(f, 1, 32, 0, nullptr, buffer.address);
}

static void die_lanes() {
    open_device();
    void *f = kernel("extern \"C\" __global__ void lanes(int *p) {\n if (threadIdx.x == 3) __syncthreads();\n"
                     "*p = __any_sync(~0u, 1);\n}", "lanes");
    Buffer<int> buffer(1);
    launch(f, 1, 32, 0, nullptr, buffer.address);
}

static void die_fault() {
    setenv("NEARFAR_EMULATED_GUARDS", "1", 1);
    open_device();
    void *f = kernel("extern \"C\" __global__ void beyond(float *p, unsigned n) {\n p[threadIdx.x + n] = 1.0f;\n}",
                     "beyond");
    Buffer<float> buffer(64);
    launch(f, 2, 32, 0, nullptr, buffer.address, 33u);
}

static void die_bounds() {
    setenv("NEARFAR_EMULATED_GUARDS", "1", 1);
    open_device();
    void *f = kernel("extern \"C\" __global__ void outside(float *p, unsigned n) {\n __shared__ float a[8], b[8];\n"
                     " a[n] = 1.0f; b[n - 1] = 2.0f;\n __syncthreads();\n p[0] = a[2] + b[3];\n}", "outside");
    Buffer<float> buffer(64);
    launch(f, 1, 1, 0, nullptr, buffer.address, 8u);
}

static void die_stack() {
    open_device();
    void *f = kernel("__device__ __noinline__ float deep(float *p, int n) { float a[256]; for (int i = 0; i < 256; i++)"
                     " a[i] = p[i % 4]; return n ? deep(p, n - 1) + a[n % 256] : a[0]; }\n"
                     "extern \"C\" __global__ void recursive(float *p) { p[0] = deep(p, 1000); }", "recursive");
    Buffer<float> buffer(64);
    launch(f, 1, 1, 0, nullptr, buffer.address);
}

static void die_written() {
    open_device();
    void *f = kernel("extern \"C\" __global__ void past(float *p) { p[10] = 1.0f; }", "past");
    Buffer<float> buffer(10);
    launch(f, 1, 1, 0, nullptr, buffer.address);
}

// Races

static void test_no_races() {
    setenv("NEARFAR_EMULATED_RACES", "1", 1);
    test_shuffles();
    test_mma();
    test_many();
    EXPECT(sums_are_right(true));
    EXPECT(copies_are_right({}));
    void *f = kernel(R"(
        extern "C" __global__ void warps(float *output) {
            __shared__ float a[256];
            unsigned i = threadIdx.x;
            for (unsigned round = 0; round < 3; round++) {
                a[i] = (float)i;
                __syncwarp();
                float x = a[i ^ 3];
                __syncwarp();
                output[blockIdx.x * 256 + i] = x;
            }
        }
    )", "warps");
    Buffer<float> output(1024);
    for (int i = 0; i < 3; i++) EXPECT(launch(f, 4, 256, 0, nullptr, output.address) == 0);
    Buffer<u16> halves(64);
    f = kernel("extern \"C\" __global__ void h(unsigned short *p) { p[threadIdx.x * 2 + blockIdx.x] = 1; }", "h");
    EXPECT(launch(f, 2, 32, 0, nullptr, halves.address) == 0);
}

static void die_race() {
    setenv("NEARFAR_EMULATED_RACES", "1", 1);
    open_device();
    sums_are_right(false);
}

static void die_race_copies() {
    setenv("NEARFAR_EMULATED_RACES", "1", 1);
    open_device();
    copies_are_right({"-DNO_BARRIER"});
}

static void die_race_lanes() {
    setenv("NEARFAR_EMULATED_RACES", "1", 1);
    open_device();
    void *f = kernel("extern \"C\" __global__ void lanes(float *p) {\n__shared__ float a[32];\n"
                     "a[threadIdx.x] = 1.0f;\n__any_sync(~0u, 1);\np[threadIdx.x] = a[31 - threadIdx.x];\n}", "lanes");
    Buffer<float> buffer(32);
    launch(f, 1, 32, 0, nullptr, buffer.address);
}

static void die_race_blocks() {
    setenv("NEARFAR_EMULATED_RACES", "1", 1);
    open_device();
    void *f = kernel("extern \"C\" __global__ void blocks(float *p) {\np[blockIdx.x] = p[blockIdx.x + 1];\n}",
                     "blocks");
    Buffer<float> buffer(32);
    launch(f, 4, 1, 0, nullptr, buffer.address);
}

struct Test {
    const char *name;
    void (*run)();
    const char *message; // that it ends with, if any
};

static const Test TESTS[] = {
    {"plain", test_plain, nullptr},
    {"shared", test_shared, nullptr},
    {"shuffles", test_shuffles, nullptr},
    {"mma", test_mma, nullptr},
    {"halves", test_halves, nullptr},
    {"dynamic", test_dynamic, nullptr},
    {"copies", test_copies, nullptr},
    {"graph", test_graph, nullptr},
    {"memory", test_memory, nullptr},
    {"compiler", test_compiler, nullptr},
    {"lost", test_lost, nullptr},
    {"no_device", test_no_device, nullptr},
    {"architecture", test_architecture, nullptr},
    {"many", test_many, nullptr},
    {"allocations", test_allocations, nullptr},
    {"threads", test_threads, nullptr},
    {"clusters", test_clusters, nullptr},
    {"deadlock", die_deadlock, "57 threads wait at the block's barrier in line 3"},
    {"barriers", die_barriers, "barriers of different lines"},
    {"warp", die_warp, "lanes of one warp wait at different operations"},
    {"lanes", die_lanes, "31 threads wait at an operation of their warp in line 3"},
    {"fault", die_fault, "after the end of an allocation of 256 bytes"},
    {"bounds", die_bounds, "kernel outside, block (0, 0, 0) of (1, 1, 1), thread (0, 0, 0)"},
    {"stack", die_stack, "the stack of a thread is full"},
    {"no_races", test_no_races, nullptr},
    {"race", die_race, "a race for a word of shared memory, between threads of one block"},
    {"race_copies", die_race_copies, "a race for a word of shared memory, between threads of one block"},
    {"race_lanes", die_race_lanes, "a race for a word of shared memory, between threads of one block"},
    {"race_blocks", die_race_blocks, "a race for a word of global memory, between two blocks"},
    {"written", die_written, "the byte at 40, after their end, was written to"},
};

int main(int count, char **arguments) {
    if (count < 2) {
        fprintf(stderr, "usage: self_test FOLDER [TEST]\n");
        return 2;
    }
    folder = arguments[1];
    setvbuf(stdout, nullptr, _IONBF, 0);
    int failed = 0;
    for (const Test &test : TESTS) {
        if (count > 2 && strcmp(arguments[2], test.name)) continue;
        int ends[2];
        if (pipe(ends)) return 1;
        pid_t process = fork();
        if (process == 0) {
            dup2(ends[1], 1);
            dup2(ends[1], 2);
            close(ends[0]);
            close(ends[1]);
            test.run();
            _exit(failures ? 1 : 0);
        }
        close(ends[1]);
        std::string output;
        char buffer[4096];
        for (ssize_t bytes; (bytes = read(ends[0], buffer, sizeof(buffer))) > 0;) output.append(buffer, (size_t)bytes);
        close(ends[0]);
        int status = 0;
        waitpid(process, &status, 0);
        bool good = test.message ? status != 0 && output.find(test.message) != std::string::npos : status == 0;
        printf("%-14s%s\n", test.name, good ? "ok" : "FAILED");
        if (!good || count > 2) printf("%s", output.c_str());
        failed += !good;
    }
    return failed ? 1 : 0;
}
