// A libcuda.so.1 without a GPU: memory is the host's, a module is a shared library that the emulated NVRTC has made,
// and a launch runs the threads of a block as fibers. Everything is done before a call returns. See README.md.

#include "emulation/runtime.h"

#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include <dlfcn.h>
#include <elf.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>

#ifdef __F16C__
#include <immintrin.h>
#endif

#define EXPORT extern "C" __attribute__((visibility("default")))

typedef uint32_t u32;
typedef uint64_t u64;

using emulation::Block;
using emulation::Call;
using emulation::Runtime;
using emulation::Thread;

// ---------------------------------------------------------------------------------------------------------------------
// Results

#define RESULTS(X)                                                                                                     \
    X(SUCCESS, 0, "no error")                                                                                          \
    X(INVALID_VALUE, 1, "invalid argument")                                                                            \
    X(OUT_OF_MEMORY, 2, "out of memory")                                                                               \
    X(NOT_INITIALIZED, 3, "initialization error")                                                                      \
    X(NO_DEVICE, 100, "no CUDA-capable device is detected")                                                            \
    X(INVALID_DEVICE, 101, "invalid device ordinal")                                                                   \
    X(INVALID_IMAGE, 200, "device kernel image is invalid")                                                            \
    X(INVALID_CONTEXT, 201, "invalid device context")                                                                  \
    X(NO_BINARY_FOR_GPU, 209, "no kernel image is available for execution on the device")                              \
    X(UNSUPPORTED_LIMIT, 215, "limit is not supported on this architecture")                                           \
    X(INVALID_PTX, 218, "a PTX JIT compilation failed")                                                                \
    X(UNSUPPORTED_PTX_VERSION, 222, "the provided PTX was compiled with an unsupported toolchain.")                    \
    X(FILE_NOT_FOUND, 301, "file not found")                                                                           \
    X(OPERATING_SYSTEM, 304, "OS call failed or operation not supported on this OS")                                   \
    X(INVALID_HANDLE, 400, "invalid resource handle")                                                                  \
    X(ILLEGAL_STATE, 401, "the operation cannot be performed in the present state")                                    \
    X(NOT_FOUND, 500, "named symbol not found")                                                                        \
    X(NOT_READY, 600, "device not ready")                                                                              \
    X(ILLEGAL_ADDRESS, 700, "an illegal memory access was encountered")                                                \
    X(LAUNCH_OUT_OF_RESOURCES, 701, "too many resources requested for launch")                                         \
    X(ASSERT, 710, "device-side assert triggered")                                                                     \
    X(MISALIGNED_ADDRESS, 716, "misaligned address")                                                                   \
    X(LAUNCH_FAILED, 719, "unspecified launch failure")                                                                \
    X(NOT_PERMITTED, 800, "operation not permitted")                                                                   \
    X(NOT_SUPPORTED, 801, "operation not supported")                                                                   \
    X(STREAM_CAPTURE_UNSUPPORTED, 900, "operation not permitted when stream is capturing")                             \
    X(STREAM_CAPTURE_INVALIDATED, 901, "operation failed due to a previous error during capture")                      \
    X(STREAM_CAPTURE_MERGE, 902, "operation would result in a merge of separate capture sequences")                    \
    X(STREAM_CAPTURE_UNMATCHED, 903, "capture was not ended in the same stream as it began")                           \
    X(STREAM_CAPTURE_UNJOINED, 904, "capturing stream has unjoined work")                                              \
    X(STREAM_CAPTURE_ISOLATION, 905, "dependency created on uncaptured work in another stream")                        \
    X(STREAM_CAPTURE_IMPLICIT, 906, "operation would make the legacy stream depend on a capturing blocking stream")    \
    X(CAPTURED_EVENT, 907, "operation not permitted on an event last recorded in a capturing stream")                  \
    X(STREAM_CAPTURE_WRONG_THREAD, 908, "attempt to terminate a thread-local capture sequence from another thread")    \
    X(INVALID_CLUSTER_SIZE, 912, "cluster configuration is invalid")                                                   \
    X(UNKNOWN, 999, "unknown error")

enum Result : int {
#define X(name, number, text) name = number,
    RESULTS(X)
#undef X
};

EXPORT Result cuGetErrorName(Result result, const char **text) {
    switch ((int)result) {
#define X(name, number, description)                                                                                   \
    case number:                                                                                                       \
        *text = number == 0 ? "CUDA_SUCCESS" : "CUDA_ERROR_" #name;                                                    \
        return SUCCESS;
        RESULTS(X)
#undef X
    }
    *text = nullptr;
    return INVALID_VALUE;
}

EXPORT Result cuGetErrorString(Result result, const char **text) {
    switch ((int)result) {
#define X(name, number, description)                                                                                   \
    case number:                                                                                                       \
        *text = description;                                                                                           \
        return SUCCESS;
        RESULTS(X)
#undef X
    }
    *text = nullptr;
    return INVALID_VALUE;
}

// ---------------------------------------------------------------------------------------------------------------------
// What the environment says

static long long number_of(const char *name, long long otherwise) {
    const char *text = getenv(name);
    if (!text || !*text) return otherwise;
    return strtoll(text, nullptr, 0);
}

struct Settings {
    int major = 9, minor = 0;
    int multiprocessors = 132;
    int driver_version = 12080;
    int devices = 1;
    u64 memory = 16ull << 30;
    bool guards = false, races = false, keep = false;
    u64 seed = 1;
    unsigned workers = 1;
    long long failing_launch = 0, failing_allocation = 0;

    Settings() {
        if (const char *text = getenv("NEARFAR_EMULATED_ARCHITECTURE")) {
            int a = 0, b = 0;
            if (sscanf(text, "%d.%d", &a, &b) == 2) {
                major = a, minor = b;
            } else if (sscanf(text, "%*[^0-9]%d", &a) == 1 || sscanf(text, "%d", &a) == 1) {
                major = a / 10, minor = a % 10;
            }
        }
        multiprocessors = (int)number_of("NEARFAR_EMULATED_MULTIPROCESSORS", multiprocessors);
        driver_version = (int)number_of("NEARFAR_EMULATED_DRIVER_VERSION", driver_version);
        devices = (int)number_of("NEARFAR_EMULATED_DEVICES", devices);
        memory = (u64)number_of("NEARFAR_EMULATED_MEMORY", (long long)memory);
        guards = number_of("NEARFAR_EMULATED_GUARDS", 0) != 0;
        races = number_of("NEARFAR_EMULATED_RACES", 0) != 0;
        keep = number_of("NEARFAR_EMULATED_KEEP", 0) != 0;
        seed = (u64)number_of("NEARFAR_EMULATED_SEED", 1);
        unsigned cores = std::thread::hardware_concurrency();
        workers = (unsigned)number_of("NEARFAR_EMULATED_WORKERS", cores ? cores : 1);
        if (workers < 1 || races) workers = 1;
        if (const char *text = getenv("NEARFAR_EMULATED_FAILURE")) {
            if (!strncmp(text, "launch:", 7)) failing_launch = atoll(text + 7);
            if (!strncmp(text, "allocation:", 11)) failing_allocation = atoll(text + 11);
        }
    }

    int architecture() const { return major * 10 + minor; }

    // The shared memory of a block at most, and of a multiprocessor.
    int block_shared() const {
        switch (architecture()) {
        case 75: return 64 << 10;
        case 80: case 87: return 163 << 10;
        case 86: case 89: case 120: case 121: return 99 << 10;
        default: return architecture() < 75 ? 48 << 10 : 227 << 10;
        }
    }

    int multiprocessor_shared() const { return block_shared() + (architecture() > 75 ? 1 << 10 : 0); }

    int multiprocessor_threads() const {
        switch (architecture()) {
        case 75: return 1024;
        case 86: case 87: case 89: case 120: case 121: return 1536;
        default: return 2048;
        }
    }

    int multiprocessor_blocks() const {
        switch (architecture()) {
        case 75: case 86: case 87: return 16;
        case 89: case 120: case 121: return 24;
        default: return 32;
        }
    }
};

static const Settings &settings() {
    static const Settings settings;
    return settings;
}

static u64 mixed(u64 x) {
    x += 0x9e3779b97f4a7c15ull;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ x >> 27) * 0x94d049bb133111ebull;
    return x ^ x >> 31;
}

// ---------------------------------------------------------------------------------------------------------------------
// Memory. (State that has a destructor is never destroyed: the workers go on until the process has ended.)

struct Allocation {
    size_t size;
    char *mapping;
    size_t mapped;
    bool host;
    u64 id;
};

static std::mutex &memory_mutex = *new std::mutex;
static std::map<uintptr_t, Allocation> &allocations = *new std::map<uintptr_t, Allocation>; // by first address
static u64 memory_used = 0, allocations_made = 0;

static const size_t PAGE = 4096;
static const size_t FILL_LIMIT = 256 << 20; // larger memory is not filled, as that would make all of it resident

// Where races are looked for, all memory of the device lies in one range of addresses, none of which is used twice, and
// what is known of its words in another.
static const u64 ARENA = 1ull << 40;
static char *arena = nullptr, *arena_next = nullptr, *arena_shadow = nullptr;

static bool make_arena(u64 shadow) {
    if (arena) return true;
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void *memory = mmap(nullptr, ARENA, PROT_NONE, flags, -1, 0);
    void *about = mmap(nullptr, ARENA * shadow, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (memory == MAP_FAILED || about == MAP_FAILED) return false;
    arena = arena_next = (char *)memory;
    arena_shadow = (char *)about;
    return true;
}

static const u64 SHADOW = 10; // bytes of what is known of a byte, see Cell

// The allocation that the address lies in, if any. The caller holds the mutex.
static std::map<uintptr_t, Allocation>::iterator allocation_of(uintptr_t address) {
    auto next = allocations.upper_bound(address);
    if (next == allocations.begin()) return allocations.end();
    --next;
    return address < next->first + next->second.size ? next : allocations.end();
}

static Result allocate(void **result, size_t size, bool host) {
    if (!result || size == 0) return INVALID_VALUE;
    std::lock_guard<std::mutex> lock(memory_mutex);
    if (!host) {
        allocations_made++;
        if (settings().failing_allocation && (long long)allocations_made == settings().failing_allocation) {
            return OUT_OF_MEMORY;
        }
        if (size > settings().memory || memory_used + size > settings().memory) return OUT_OF_MEMORY;
    }
    size_t inner = (size + PAGE - 1) / PAGE * PAGE, mapped = inner + 2 * PAGE;
    char *mapping;
    if (settings().races && !host) {
        if (!make_arena(SHADOW) || mapped > (size_t)(arena + ARENA - arena_next)) return OUT_OF_MEMORY;
        mapping = arena_next;
        arena_next += mapped;
    } else {
        mapping = (char *)mmap(nullptr, mapped, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (mapping == MAP_FAILED) return OUT_OF_MEMORY;
    }
    if (mprotect(mapping + PAGE, inner, PROT_READ | PROT_WRITE)) {
        munmap(mapping, mapped);
        return OUT_OF_MEMORY;
    }
#ifdef MADV_HUGEPAGE
    if (inner >= 4 << 20) madvise(mapping + PAGE, inner, MADV_HUGEPAGE);
#endif
    if (inner <= FILL_LIMIT) memset(mapping + PAGE, 0xff, inner);
    char *start = mapping + PAGE;
    if (settings().guards) start += inner - (size + 15) / 16 * 16;
    allocations[(uintptr_t)start] = {size, mapping, mapped, host, allocations_made};
    if (!host) memory_used += size;
    *result = start;
    return SUCCESS;
}

static void fatal(const char *format, ...);

static Result release(uintptr_t address, bool host) {
    std::lock_guard<std::mutex> lock(memory_mutex);
    auto found = allocations.find(address);
    if (found == allocations.end() || found->second.host != host) return INVALID_VALUE;
    Allocation allocation = found->second;
    if (allocation.mapped - 2 * PAGE <= FILL_LIMIT) {
        const unsigned char *byte = (unsigned char *)address + allocation.size;
        const unsigned char *end = (unsigned char *)allocation.mapping + allocation.mapped - PAGE;
        for (; byte < end; byte++) {
            if (*byte != 0xff) {
                fatal("%zu bytes of memory are freed; the byte at %zu, after their end, was written to",
                      allocation.size, (size_t)(byte - (unsigned char *)address));
            }
        }
    }
    allocations.erase(found);
    if (settings().races && !host) {
        const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED;
        mmap(allocation.mapping, allocation.mapped, PROT_NONE, flags, -1, 0);
        u64 from = (u64)(allocation.mapping - arena) * SHADOW;
        madvise(arena_shadow + from, allocation.mapped * SHADOW, MADV_DONTNEED);
    } else {
        munmap(allocation.mapping, allocation.mapped);
    }
    if (!host) memory_used -= allocation.size;
    return SUCCESS;
}

// Whether all the bytes lie in one allocation of the device.
static bool on_device(uintptr_t address, size_t size) {
    std::lock_guard<std::mutex> lock(memory_mutex);
    auto found = allocation_of(address);
    return found != allocations.end() && size <= found->first + found->second.size - address;
}

// ---------------------------------------------------------------------------------------------------------------------
// Modules

struct Function;

struct Module {
    std::string image;
    std::mutex mutex;
    // The library, loaded once for each worker, so that each has its own shared variables.
    struct Instance {
        void *handle = nullptr;
        const emulation::Module *module = nullptr;
        char *base = nullptr;
    };
    std::vector<Instance> instances;
    std::map<std::string, std::unique_ptr<Function>> functions;

    ~Module();
    const Instance *instance(unsigned worker, std::string *error);
};

struct Function {
    Module *module = nullptr;
    std::string name;
    const emulation::Kernel *kernel = nullptr; // of worker 0
    std::vector<const emulation::Kernel *> kernels;
    int static_shared = 0;
    int dynamic_limit = 0;
};

static std::set<Module *> &modules = *new std::set<Module *>;
static std::mutex &modules_mutex = *new std::mutex;

static const std::string &temporary_folder() {
    static const std::string folder = [] {
        const char *root = getenv("TMPDIR");
        return std::string(root && *root ? root : "/tmp");
    }();
    return folder;
}

const Module::Instance *Module::instance(unsigned worker, std::string *error) {
    std::lock_guard<std::mutex> lock(mutex);
    if (instances.empty()) instances.resize(settings().workers);
    Instance &instance = instances[worker];
    if (instance.handle) return &instance;
    // Every copy is a file of its own: the loader knows libraries by name and by inode.
    std::string path = temporary_folder() + "/nearfar-module-XXXXXX";
    int file = mkstemp(&path[0]);
    if (file < 0) {
        *error = "no temporary file";
        return nullptr;
    }
    for (size_t done = 0; done < image.size();) {
        ssize_t written = write(file, image.data() + done, image.size() - done);
        if (written <= 0) break;
        done += (size_t)written;
    }
    close(file);
    void *handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (!handle) {
        const char *message = dlerror();
        *error = message ? message : "dlopen";
    }
    if (!settings().keep) unlink(path.c_str());
    if (!handle) return nullptr;
    auto module = (const emulation::Module *)dlsym(handle, "emulation__module");
    if (!module) {
        *error = "this is no module of the emulation";
        dlclose(handle);
        return nullptr;
    }
    instance.handle = handle;
    instance.module = module;
    Dl_info info;
    if (dladdr(module, &info)) instance.base = (char *)info.dli_fbase;
    return &instance;
}

Module::~Module() {
    for (Instance &instance : instances) {
        if (instance.handle) dlclose(instance.handle);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Fibers

// emulation_switch(void **save, void *load) keeps the present stack in *save and goes on with another.
// emulation_enter(Thread *thread, void (*launch)(void **), void **arguments) calls a kernel with the register set.
// emulation_begin is where a new fiber begins; it finds the fiber in a register that a switch restores.
extern "C" void emulation_switch(void **save, void *load) __attribute__((visibility("hidden")));
extern "C" void emulation_enter(Thread *, void (*)(void **), void **) __attribute__((visibility("hidden")));
extern "C" void emulation_begin() __attribute__((visibility("hidden")));
extern "C" void emulation_fiber(void *fiber) __attribute__((visibility("hidden"), used));

#if defined(__x86_64__)
static const int SAVED = 7; // words of a stack that is switched away from
static const int SAVED_FIBER = 4, SAVED_RETURN = 6;
asm(R"(
    .text
    .globl emulation_switch
    .hidden emulation_switch
    .type emulation_switch, @function
emulation_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size emulation_switch, .-emulation_switch

    .globl emulation_enter
    .hidden emulation_enter
    .type emulation_enter, @function
emulation_enter:
    pushq %r15
    movq %rdi, %r15
    movq %rdx, %rdi
    call *%rsi
    popq %r15
    ret
    .size emulation_enter, .-emulation_enter

    .globl emulation_begin
    .hidden emulation_begin
    .type emulation_begin, @function
emulation_begin:
    movq %rbx, %rdi
    call emulation_fiber
    ud2
    .size emulation_begin, .-emulation_begin
)");
#elif defined(__aarch64__)
static const int SAVED = 20;
static const int SAVED_FIBER = 0, SAVED_RETURN = 11;
asm(R"(
    .text
    .globl emulation_switch
    .hidden emulation_switch
    .type emulation_switch, %function
emulation_switch:
    sub sp, sp, #160
    stp x19, x20, [sp, #0]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x19, x20, [sp, #0]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
    .size emulation_switch, .-emulation_switch

    .globl emulation_enter
    .hidden emulation_enter
    .type emulation_enter, %function
emulation_enter:
    stp x28, x30, [sp, #-16]!
    mov x28, x0
    mov x0, x2
    blr x1
    ldp x28, x30, [sp], #16
    ret
    .size emulation_enter, .-emulation_enter

    .globl emulation_begin
    .hidden emulation_begin
    .type emulation_begin, %function
emulation_begin:
    mov x0, x19
    bl emulation_fiber
    brk #0
    .size emulation_begin, .-emulation_begin
)");
#else
#error "the emulation knows x86-64 and AArch64 only"
#endif

static const size_t STACK = 64 << 10; // of a fiber, with the page below it that guards it
static const unsigned MAX_THREADS = 1024;
static const size_t DYNAMIC = 256 << 10; // shared memory of a worker

struct Worker;
struct Lane;
struct Launch;

struct Fiber {
    void *stack_pointer; // while it runs no thread
    Worker *worker;
    Lane *lane; // to run
};

// A copy under way from global to shared memory.
struct Copy {
    void *shared;
    const void *global;
    bool valid;
    unsigned group, line;
};

enum State : unsigned char { READY, AT_BARRIER, AT_WARP, ENDED };

struct alignas(64) Lane : Thread {
    void *stack_pointer; // while it waits
    Fiber *fiber;
    Call *call;
    State state;
    unsigned char warp;
    unsigned line; // of the last barrier or operation of the warp
    // What is used less often
    unsigned copies_begun, groups;
    std::vector<Copy> copies;
};

struct Warp {
    unsigned present; // the lanes that there are
    unsigned ended;
    unsigned waiting; // at an operation of some of the lanes
    // An operation of all lanes: how many lanes have arrived, of how many that have not ended, and what they bring, in
    // one of two places in turn, as a lane may bring the next before another has read this one.
    unsigned arrived, alive, operations, line;
    unsigned syncs; // __syncwarp of all lanes
    emulation::Kind kind;
    unsigned bits[2];
    u64 values[2][32];
};

static const unsigned ORDERS = 64;
static unsigned char orders[ORDERS][32]; // orders of 32 lanes or warps

struct Worker : Block {
    unsigned number = 0;
    const Launch *launch = nullptr;
    const emulation::Kernel *kernel = nullptr;
    const emulation::Module *module = nullptr;
    const char *base = nullptr;    // of the module
    void *stack_pointer = nullptr; // of the worker itself while fibers run
    Lane *current = nullptr;
    unsigned count = 0, warp_count = 0; // threads and warps of a block
    uint3 shape = {0, 0, 0};
    unsigned ended = 0;
    unsigned arrived = 0, arrived_line = 0, predicates = 0;
    unsigned barrier_results[2] = {0, 0}; // of the last barrier and of the one before, by the number of the barrier
    unsigned barriers = 0;
    u32 serial = 0, first_serial = 1; // of the block, and of the first of its launch
    u64 random = 0;
    unsigned ready_count = 0;
    Lane *ready[MAX_THREADS];
    std::vector<Fiber *> unused;
    char *stacks = nullptr;
    unsigned stacks_made = 0;
    char *dynamic_memory = nullptr;
    Warp warps[MAX_THREADS / 32];
    Lane lanes[MAX_THREADS];

    void run(const Launch *, u64 block);
    void fill();
    Lane *next();
    Fiber *take();
    void begin(Lane *);
};

struct Launch {
    Function *function;
    uint3 grid, threads, cluster;
    unsigned dynamic;
    void **arguments;
    u64 total;
    u64 number;
    std::atomic<u64> *begun;
};

static thread_local Worker *present_worker = nullptr;

static void describe_thread() {
    Worker *worker = present_worker;
    if (!worker || !worker->launch) return;
    dprintf(2, "emulated GPU: kernel %s, block (%u, %u, %u) of (%u, %u, %u)", worker->launch->function->name.c_str(),
            worker->index.x, worker->index.y, worker->index.z, worker->grid.x, worker->grid.y, worker->grid.z);
    if (Lane *lane = worker->current) {
        dprintf(2, ", thread (%u, %u, %u) of (%u, %u, %u)", lane->index.x, lane->index.y, lane->index.z,
                worker->threads.x, worker->threads.y, worker->threads.z);
        if (lane->line) dprintf(2, ", last at a barrier or an operation of the warp in line %u", lane->line);
    }
    dprintf(2, "\n");
}

static void fatal(const char *format, ...) {
    char text[1024];
    va_list list;
    va_start(list, format);
    vsnprintf(text, sizeof(text), format, list);
    va_end(list);
    dprintf(2, "emulated GPU: %s\n", text);
    describe_thread();
    abort();
}

// Tells which line of the kernel a place of its module is of, where it was compiled to know.
static void describe_place(size_t place) {
    const std::string &image = present_worker->launch->function->module->image;
    std::string path = temporary_folder() + "/nearfar-fault-XXXXXX";
    int file = mkstemp(&path[0]);
    if (file < 0) return;
    bool written = write(file, image.data(), image.size()) == (ssize_t)image.size();
    close(file);
    char offset[32];
    snprintf(offset, sizeof(offset), "0x%zx", place);
    pid_t process = written ? fork() : -1;
    if (process == 0) {
        dup2(2, 1);
        unsetenv("LD_LIBRARY_PATH");
        execlp("addr2line", "addr2line", "-e", path.c_str(), "-C", "-f", "-i", "-p", "-s", offset, (char *)nullptr);
        _exit(1);
    }
    if (process > 0) waitpid(process, nullptr, 0);
    unlink(path.c_str());
}

static inline Worker *worker_of(Thread *thread) { return static_cast<Worker *>(thread->block); }

Fiber *Worker::take() {
    if (!unused.empty()) {
        Fiber *fiber = unused.back();
        unused.pop_back();
        return fiber;
    }
    if (!stacks) {
        size_t size = MAX_THREADS * STACK;
        void *memory = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED) fatal("no memory for the stacks of fibers");
        stacks = (char *)memory;
    }
    char *stack = stacks + stacks_made * STACK;
    mprotect(stack, PAGE, PROT_NONE);
    // Stacks begin at different places of their pages: the same places would all fall into the same few lines of cache.
    size_t shift = stacks_made * 5 % 32 * 64 + stacks_made / 32 % 2 * 2048;
    char *top = stack + STACK - shift - 64;
    Fiber *fiber = new Fiber{nullptr, this, nullptr};
    void **saved = (void **)top - SAVED;
#if defined(__aarch64__)
    saved = (void **)((uintptr_t)saved & ~(uintptr_t)15);
#endif
    for (int i = 0; i < SAVED; i++) saved[i] = nullptr;
    saved[SAVED_FIBER] = fiber;
    saved[SAVED_RETURN] = (void *)emulation_begin;
    fiber->stack_pointer = saved;
    stacks_made++;
    return fiber;
}

// Gives the thread a fiber.
void Worker::begin(Lane *lane) {
    Fiber *fiber = take();
    lane->fiber = fiber;
    lane->stack_pointer = fiber->stack_pointer;
    fiber->lane = lane;
}

// Puts all threads that have not ended into the ready stack, in an order that depends on the seed and on how often this
// was done.
void Worker::fill() {
    u64 random_ = mixed(random + barriers);
    const unsigned char *warp_order = orders[random_ % ORDERS];
    random_ /= ORDERS;
    ready_count = 0;
    for (unsigned i = 0; i < 32; i++) {
        unsigned warp = warp_order[i];
        if (warp >= warp_count) continue;
        const unsigned char *lane_order = orders[(random_ + warp) % ORDERS];
        Lane *first = lanes + warp * 32;
        if (warp * 32 + 32 <= count) {
            for (unsigned j = 0; j < 32; j++) ready[ready_count++] = first + lane_order[j];
        } else {
            for (unsigned j = 0; j < 32; j++) {
                if (warp * 32 + lane_order[j] < count) ready[ready_count++] = first + lane_order[j];
            }
        }
    }
}

static void report_deadlock(Worker *worker) {
    dprintf(2, "emulated GPU: the threads of a block wait for each other:\n");
    std::map<std::pair<unsigned, unsigned>, std::pair<unsigned, unsigned>> groups; // state and line: count and first
    for (unsigned i = 0; i < worker->count; i++) {
        Lane &lane = worker->lanes[i];
        auto key = std::make_pair((unsigned)lane.state, lane.state == ENDED ? 0 : lane.line);
        auto &group = groups[key];
        if (!group.first++) group.second = i;
    }
    for (auto &entry : groups) {
        const char *what = entry.first.first == AT_BARRIER ? "wait at the block's barrier"
                           : entry.first.first == AT_WARP  ? "wait at an operation of their warp"
                                                           : "have ended";
        dprintf(2, "  %u threads %s", entry.second.first, what);
        if (entry.first.first != ENDED) dprintf(2, " in line %u", entry.first.second);
        Lane &lane = worker->lanes[entry.second.second];
        dprintf(2, ", the first is thread %u", entry.second.second);
        if (lane.state == AT_WARP && lane.call) dprintf(2, " (mask %08x)", lane.call->mask);
        dprintf(2, "\n");
    }
    worker->current = nullptr;
    describe_thread();
    abort();
}

inline Lane *Worker::next() {
    if (ready_count == 0) report_deadlock(this);
    Lane *lane = ready[--ready_count];
    // The stacks of a block are more than the nearest cache holds.
    if (ready_count >= 2) {
        const char *stack = (const char *)ready[ready_count - 1]->stack_pointer;
        __builtin_prefetch(stack);
        __builtin_prefetch(stack + 64);
        __builtin_prefetch(stack + 128);
        __builtin_prefetch(ready[ready_count - 2]);
    }
    return lane;
}

// Goes on with another thread until this one is ready again and its turn has come.
static inline void suspend(Worker *worker, Lane *lane) {
    Lane *next = worker->next();
    if (next == lane) return;
    if (!next->fiber) worker->begin(next);
    worker->current = next;
    emulation_switch(&lane->stack_pointer, next->stack_pointer);
}

static void perform(const Copy &copy) {
    if (copy.valid) {
        memcpy(copy.shared, copy.global, 16);
    } else {
        memset(copy.shared, 0, 16);
    }
}

static bool complete(Worker *worker, unsigned warp, Call *call, Lane *completer);
static void complete_whole(Worker *worker, Warp &warp, unsigned number, Lane *completer);

static void end_lane(Worker *worker, Lane *lane) {
    worker->ended++;
    lane->state = ENDED;
    lane->fiber = nullptr;
    if (!lane->copies.empty()) {
        for (const Copy &copy : lane->copies) perform(copy);
        lane->copies.clear();
    }
    Warp &warp = worker->warps[lane->warp];
    warp.ended |= 1u << lane->lane;
    warp.alive--;
    warp.values[warp.operations & 1][lane->lane] = ~(u64)0;
    // Those who wait may have waited for this one only.
    if (warp.arrived && warp.arrived == warp.alive) complete_whole(worker, warp, lane->warp, nullptr);
    unsigned waiting = warp.waiting;
    while (waiting) {
        Lane *other = worker->lanes + lane->warp * 32 + __builtin_ctz(waiting);
        waiting = complete(worker, lane->warp, other->call, nullptr) ? warp.waiting : waiting & (waiting - 1);
    }
}

extern "C" void emulation_fiber(void *argument) {
    Fiber *fiber = (Fiber *)argument;
    Worker *worker = fiber->worker;
    for (;;) {
        Lane *lane = fiber->lane;
        worker->current = lane;
        emulation_enter(lane, worker->kernel->launch, worker->launch->arguments);
        end_lane(worker, lane);
        if (worker->ended == worker->count) {
            worker->unused.push_back(fiber);
            worker->current = nullptr;
            emulation_switch(&fiber->stack_pointer, worker->stack_pointer);
            continue;
        }
        Lane *next = worker->next();
        if (!next->fiber) {
            next->fiber = fiber;
            fiber->lane = next;
            continue;
        }
        worker->unused.push_back(fiber);
        worker->current = next;
        emulation_switch(&fiber->stack_pointer, next->stack_pointer);
    }
}

void Worker::run(const Launch *of, u64 block) {
    index.x = (unsigned)(block % of->grid.x);
    index.y = (unsigned)(block / of->grid.x % of->grid.y);
    index.z = (unsigned)(block / of->grid.x / of->grid.y);
    size_t shared = (size_t)(module->shared_end - module->shared);
    if (shared) memset(module->shared, 0xff, shared);
    if (dynamic_size) memset(dynamic, 0xff, dynamic_size);
    for (unsigned i = 0; i < count; i++) {
        lanes[i].fiber = nullptr;
        lanes[i].call = nullptr;
        lanes[i].state = READY;
        lanes[i].line = 0;
        lanes[i].copies_begun = lanes[i].groups = 0;
    }
    for (unsigned i = 0; i < warp_count; i++) {
        warps[i].waiting = warps[i].ended = warps[i].arrived = warps[i].bits[0] = warps[i].bits[1] = 0;
        warps[i].alive = (unsigned)__builtin_popcount(warps[i].present);
        warps[i].syncs = 0;
    }
    ended = arrived = predicates = barriers = 0;
    serial++;
    random = mixed(settings().seed + of->number) + block * 0x9e3779b97f4a7c15ull;
    fill();
    Lane *first = next();
    begin(first);
    emulation_switch(&stack_pointer, first->stack_pointer);
}

// ---------------------------------------------------------------------------------------------------------------------
// What a kernel calls

static unsigned barrier(Thread *thread, unsigned predicate, unsigned line) {
    Lane *lane = static_cast<Lane *>(thread);
    Worker *worker = worker_of(thread);
    lane->line = line;
    if (worker->arrived && worker->arrived_line != line) {
        fatal("threads of one block wait at the barriers of different lines, %u and %u", worker->arrived_line, line);
    }
    worker->arrived_line = line;
    worker->predicates += predicate;
    lane->state = AT_BARRIER;
    unsigned number = worker->barriers;
    if (++worker->arrived == worker->count) {
        // The next barrier but one cannot be complete before every thread has left this one.
        worker->barrier_results[number & 1] = worker->predicates;
        worker->arrived = worker->predicates = 0;
        worker->barriers++;
        worker->fill();
    }
    suspend(worker, lane);
    lane->state = READY;
    return worker->barrier_results[number & 1];
}

static inline float of_f16(u32 bits) {
#ifdef __F16C__
    return _cvtsh_ss((unsigned short)bits);
#else
    u32 sign = (bits & 0x8000) << 16, exponent = bits >> 10 & 31, fraction = bits & 0x3ff;
    if (exponent == 0) {
        float value = (float)fraction * (1.0f / 16777216.0f);
        return sign ? -value : value;
    }
    u32 result = sign | (exponent == 31 ? 0x7f800000 : (exponent + 112) << 23) | fraction << 13;
    float value;
    memcpy(&value, &result, sizeof(value));
    return value;
#endif
}

static inline float of_bf16(u32 bits) {
    bits <<= 16;
    float value;
    memcpy(&value, &bits, sizeof(value));
    return value;
}

static inline float truncated(u32 word) {
    word &= ~0x1fffu; // a tf32 has 10 bits of fraction; the rest is not looked at
    float value;
    memcpy(&value, &word, sizeof(value));
    return value;
}

typedef float Row __attribute__((vector_size(32))); // 8 columns

// d (16 x 8) += a (16 x K) b (K x 8), one product after the other in order of k. A product of two numbers of 11 bits is
// exact in f32, so that each step rounds once.
template <int K> static inline void multiply(Row (&d)[16], const float (&a)[16][K], const Row (&b)[K]) {
    for (int i = 0; i < 16; i += 4) {
        Row sum0 = d[i], sum1 = d[i + 1], sum2 = d[i + 2], sum3 = d[i + 3];
        for (int k = 0; k < K; k++) {
            sum0 += a[i][k] * b[k];
            sum1 += a[i + 1][k] * b[k];
            sum2 += a[i + 2][k] * b[k];
            sum3 += a[i + 3][k] * b[k];
        }
        d[i] = sum0, d[i + 1] = sum1, d[i + 2] = sum2, d[i + 3] = sum3;
    }
}

template <float OF(u32)> static void multiply_halves(Lane *lanes, Row (&d)[16]) {
    float a[16][16];
    Row b[16];
    for (int lane = 0; lane < 32; lane++) {
        const u32 *x = (const u32 *)lanes[lane].call->a, *y = (const u32 *)lanes[lane].call->b;
        int group = lane / 4, place = lane % 4 * 2;
        for (int i = 0; i < 4; i++) {
            a[group + i % 2 * 8][place + i / 2 * 8] = OF(x[i] & 0xffff);
            a[group + i % 2 * 8][place + i / 2 * 8 + 1] = OF(x[i] >> 16);
        }
        for (int i = 0; i < 2; i++) {
            b[place + i * 8][group] = OF(y[i] & 0xffff);
            b[place + i * 8 + 1][group] = OF(y[i] >> 16);
        }
    }
    multiply<16>(d, a, b);
}

static void multiply_warp(Lane *lanes, emulation::Kind kind) {
    Row d[16];
    for (int lane = 0; lane < 32; lane++) {
        const float *c = (const float *)lanes[lane].call->result;
        int row = lane / 4, column = lane % 4 * 2;
        d[row][column] = c[0], d[row][column + 1] = c[1];
        d[row + 8][column] = c[2], d[row + 8][column + 1] = c[3];
    }
    if (kind == emulation::MMA_F16) {
        multiply_halves<of_f16>(lanes, d);
    } else if (kind == emulation::MMA_BF16) {
        multiply_halves<of_bf16>(lanes, d);
    } else {
        float a[16][8];
        Row b[8];
        for (int lane = 0; lane < 32; lane++) {
            const u32 *x = (const u32 *)lanes[lane].call->a, *y = (const u32 *)lanes[lane].call->b;
            int group = lane / 4, place = lane % 4;
            for (int i = 0; i < 4; i++) a[group + i % 2 * 8][place + i / 2 * 4] = truncated(x[i]);
            for (int i = 0; i < 2; i++) b[place + i * 4][group] = truncated(y[i]);
        }
        multiply<8>(d, a, b);
    }
    for (int lane = 0; lane < 32; lane++) {
        float *c = (float *)lanes[lane].call->result;
        int row = lane / 4, column = lane % 4 * 2;
        c[0] = d[row][column], c[1] = d[row][column + 1];
        c[2] = d[row + 8][column], c[3] = d[row + 8][column + 1];
    }
}

static void access_in_line(Lane *lane, const void *address, size_t size, bool write, unsigned line);

static bool in_shared(Worker *worker, const void *address, size_t size) {
    const char *p = (const char *)address;
    if (p >= worker->module->shared && p + size <= worker->module->shared_end) return true;
    const char *dynamic = (const char *)worker->dynamic;
    return p >= dynamic && p + size <= dynamic + worker->dynamic_size;
}

static void load_matrices(Worker *worker, Lane *lanes, bool transposed) {
    uint16_t matrices[4][8][8];
    for (int lane = 0; lane < 32; lane++) {
        const void *row = lanes[lane].call->a;
        if ((uintptr_t)row % 16) fatal("ldmatrix in line %u: lane %d's row is misaligned", lanes[lane].line, lane);
        if (!in_shared(worker, row, 16)) {
            fatal("ldmatrix in line %u: lane %d's row does not lie in shared memory", lanes[lane].line, lane);
        }
        access_in_line(lanes + lane, row, 16, false, lanes[lane].line);
        memcpy(matrices[lane / 8][lane % 8], row, 16);
    }
    for (int lane = 0; lane < 32; lane++) {
        u32 *result = (u32 *)lanes[lane].call->result;
        int a = lane / 4, b = lane % 4 * 2;
        for (int m = 0; m < 4; m++) {
            u32 low = transposed ? matrices[m][b][a] : matrices[m][a][b];
            u32 high = transposed ? matrices[m][b + 1][a] : matrices[m][a][b + 1];
            result[m] = low | high << 16;
        }
    }
}

// Makes lanes of a warp ready, in an order by chance, but for the one given.
static inline void make_ready(Worker *worker, unsigned number, unsigned which, Lane *running) {
    Lane *lanes = worker->lanes + number * 32;
    unsigned excluded = running ? running->lane : 32;
    worker->random += 0x632be59bd9b4e019ull;
    const unsigned char *order = orders[(worker->random >> 40) % ORDERS];
    unsigned count = worker->ready_count;
    if (which == 0xffffffffu) {
        for (unsigned i = 0; i < 32; i++) {
            worker->ready[count] = lanes + order[i];
            count += order[i] != excluded;
        }
    } else {
        for (unsigned i = 0; i < 32; i++) {
            if (which >> order[i] & 1 && order[i] != excluded) worker->ready[count++] = lanes + order[i];
        }
    }
    worker->ready_count = count;
}

static void complete_whole(Worker *worker, Warp &warp, unsigned number, Lane *completer) {
    if (warp.kind >= emulation::MMA_F16) {
        if (warp.alive != 32) fatal("an operation of the whole warp in line %u lacks lanes", warp.line);
        Lane *lanes = worker->lanes + number * 32;
        if (warp.kind == emulation::LDMATRIX || warp.kind == emulation::LDMATRIX_TRANS) {
            load_matrices(worker, lanes, warp.kind == emulation::LDMATRIX_TRANS);
        } else {
            multiply_warp(lanes, warp.kind);
        }
    }
    warp.arrived = 0;
    warp.operations++;
    warp.syncs += warp.kind == emulation::SYNC;
    // All have read what was brought to the operation before.
    warp.bits[warp.operations & 1] = 0;
    for (unsigned rest = warp.ended; rest; rest &= rest - 1) {
        warp.values[warp.operations & 1][__builtin_ctz(rest)] = ~(u64)0;
    }
    make_ready(worker, number, warp.present & ~warp.ended, completer);
}

// An operation of all lanes that have not ended.
static inline void meet(Worker *worker, Lane *lane, Warp &warp, emulation::Kind kind, unsigned line) {
    lane->line = line;
    if (warp.arrived == 0) {
        warp.kind = kind;
        warp.line = line;
    } else if (warp.kind != kind) {
        fatal("lanes of one warp wait at different operations, in lines %u and %u", warp.line, line);
    }
    if (++warp.arrived == warp.alive) {
        complete_whole(worker, warp, lane->warp, lane);
    } else {
        lane->state = AT_WARP;
        suspend(worker, lane);
        lane->state = READY;
    }
}

// An operation of some lanes: carries it out if all that it names have arrived. They become ready, but the completer
// goes on.
static bool complete(Worker *worker, unsigned number, Call *call, Lane *completer) {
    Warp &warp = worker->warps[number];
    Lane *lanes = worker->lanes + number * 32;
    unsigned mask = call->mask, needed = mask & warp.present & ~warp.ended;
    if ((warp.waiting & mask) != needed) return false;
    emulation::Kind kind = call->kind;
    for (unsigned rest = needed; rest; rest &= rest - 1) {
        Call *other = lanes[__builtin_ctz(rest)].call;
        if (other->mask != mask || other->kind != kind) return false;
    }
    unsigned bits = 0;
    for (unsigned rest = needed; rest; rest &= rest - 1) {
        int lane = __builtin_ctz(rest);
        Call *reader = lanes[lane].call;
        if (kind == emulation::SHUFFLE) {
            bool there = reader->lane < 32 && needed >> reader->lane & 1;
            *(u64 *)reader->result = there ? *(const u64 *)lanes[reader->lane].call->a : ~(u64)0;
        } else if (kind == emulation::VOTE) {
            bits |= *(const unsigned *)reader->a << lane;
        }
    }
    for (unsigned rest = needed; rest; rest &= rest - 1) {
        Lane &lane = lanes[__builtin_ctz(rest)];
        if (kind == emulation::VOTE) *(unsigned *)lane.call->result = bits;
        lane.call = nullptr;
    }
    warp.waiting &= ~needed;
    make_ready(worker, number, needed, completer);
    return true;
}

static void meet_some(Worker *worker, Lane *lane, Call *call) {
    lane->line = call->line;
    if (!(call->mask >> lane->lane & 1)) {
        fatal("an operation of the warp in line %u: mask %08x lacks the lane %u itself", call->line, call->mask,
              lane->lane);
    }
    lane->call = call;
    worker->warps[lane->warp].waiting |= 1u << lane->lane;
    if (complete(worker, lane->warp, call, lane)) return;
    lane->state = AT_WARP;
    suspend(worker, lane);
    lane->state = READY;
}

static void sync_warp(Thread *thread, unsigned mask, unsigned line) {
    Lane *lane = static_cast<Lane *>(thread);
    Worker *worker = worker_of(thread);
    Warp &warp = worker->warps[lane->warp];
    if ((mask & warp.present) == warp.present) {
        meet(worker, lane, warp, emulation::SYNC, line);
    } else {
        Call call = {emulation::SYNC, mask, line, 0, nullptr, nullptr, nullptr};
        meet_some(worker, lane, &call);
    }
}

static unsigned long shuffle(Thread *thread, unsigned mask, unsigned long value, unsigned from, unsigned line) {
    Lane *lane = static_cast<Lane *>(thread);
    Worker *worker = worker_of(thread);
    Warp &warp = worker->warps[lane->warp];
    if ((mask & warp.present) == warp.present) {
        u64 *values = warp.values[warp.operations & 1];
        values[lane->lane] = value;
        meet(worker, lane, warp, emulation::SHUFFLE, line);
        return values[from];
    }
    u64 result = 0;
    Call call = {emulation::SHUFFLE, mask, line, from, &value, nullptr, &result};
    meet_some(worker, lane, &call);
    return result;
}

static unsigned vote(Thread *thread, unsigned mask, unsigned bit, unsigned line) {
    Lane *lane = static_cast<Lane *>(thread);
    Worker *worker = worker_of(thread);
    Warp &warp = worker->warps[lane->warp];
    if ((mask & warp.present) == warp.present) {
        unsigned *bits = warp.bits + (warp.operations & 1);
        *bits |= bit << lane->lane;
        meet(worker, lane, warp, emulation::VOTE, line);
        return *bits;
    }
    unsigned result = 0;
    Call call = {emulation::VOTE, mask, line, 0, &bit, nullptr, &result};
    meet_some(worker, lane, &call);
    return result;
}

static void whole_warp(Thread *thread, Call *call) {
    Lane *lane = static_cast<Lane *>(thread);
    Worker *worker = worker_of(thread);
    lane->call = call;
    meet(worker, lane, worker->warps[lane->warp], call->kind, call->line);
    lane->call = nullptr;
}

// ---------------------------------------------------------------------------------------------------------------------
// Races: two threads access a word, at least one of them writes, and nothing orders them. Threads of a block are
// ordered by its barriers, lanes of a warp by __syncwarp, threads of two blocks by nothing within a launch.

struct Access {
    u32 serial; // of the block
    u32 barrier, sync;
    u32 place; // in the module, or a line with the highest bit set
    uint16_t thread;
    unsigned char mask; // the bytes of the word
    unsigned char many; // reads: of several lanes (1), warps (2), blocks (4) since
};

struct Cell {
    Access write, read; // the last
};

static_assert(sizeof(Cell) == 4 * SHADOW, "a word has one cell");

static Cell shared_cells[(48 << 10) / 4 + DYNAMIC / 4];

static void describe_access(const Access &access, const char *what) {
    dprintf(2, "  thread %u %s: ", access.thread, what);
    if (access.place >> 31) {
        dprintf(2, "line %u\n", access.place & 0x7fffffff);
    } else {
        describe_place(access.place);
    }
}

static void report_race(const Access &before, const char *did, const Access &now, const char *does, bool shared) {
    dprintf(2, "emulated GPU: a race for a word of %s memory, between %s:\n", shared ? "shared" : "global",
            before.serial == now.serial ? "threads of one block" : "two blocks");
    describe_access(before, did);
    describe_access(now, does);
    describe_thread();
    abort();
}

static inline bool races(u32 first, const Access &before, const Access &now) {
    if (before.serial < first || !(before.mask & now.mask)) return false;
    if (before.serial != now.serial || before.many & 4) return true;
    if (before.barrier != now.barrier) return false;
    if (before.thread / 32 != now.thread / 32 || before.many & 2) return true;
    return before.sync == now.sync && (before.thread != now.thread || before.many & 1);
}

static void access_word(Worker *worker, Cell &cell, const Access &now, bool write, bool shared) {
    u32 first = shared ? worker->serial : worker->first_serial; // what was before is forgotten
    if (races(first, cell.write, now)) {
        report_race(cell.write, "wrote", now, write ? "writes" : "reads", shared);
    }
    if (write) {
        if (races(first, cell.read, now)) report_race(cell.read, "read", now, "writes", shared);
        cell.write = now;
        return;
    }
    Access &read = cell.read;
    unsigned char many = 0, mask = now.mask;
    if (read.serial >= first) {
        many = read.many & 4;
        if (read.serial != now.serial) {
            many |= 4;
        } else if (read.barrier == now.barrier) {
            many |= read.many & 2;
            if (read.thread / 32 != now.thread / 32) {
                many |= 2;
            } else if (read.sync == now.sync) {
                many |= read.many & 1;
                if (read.thread != now.thread) many |= 1;
            }
        }
        mask |= many ? read.mask : 0;
    }
    read = now;
    read.many = many;
    read.mask = mask;
}

static void access_memory(Lane *lane, uintptr_t address, size_t size, bool write, u32 place) {
    Worker *worker = worker_of(lane);
    Cell *cells;
    uintptr_t start;
    bool shared = true;
    uintptr_t variables = (uintptr_t)worker->module->shared, dynamic = (uintptr_t)worker->dynamic;
    if (address - (uintptr_t)arena < ARENA && arena) {
        cells = (Cell *)arena_shadow;
        start = (uintptr_t)arena;
        shared = false;
    } else if (address - variables < (uintptr_t)(worker->module->shared_end - worker->module->shared)) {
        cells = shared_cells;
        start = variables & ~(uintptr_t)3;
    } else if (address - dynamic < worker->dynamic_size) {
        cells = shared_cells + (48 << 10) / 4;
        start = dynamic;
    } else {
        return;
    }
    Access now = {worker->serial, worker->barriers, worker->warps[lane->warp].syncs, place,
                  (uint16_t)(lane - worker->lanes), 0, 0};
    for (uintptr_t at = address, end = address + size; at < end;) {
        uintptr_t next = (at | 3) + 1 < end ? (at | 3) + 1 : end;
        now.mask = (unsigned char)(((1u << (next - at)) - 1) << (at & 3));
        access_word(worker, cells[(at - start) / 4], now, write, shared);
        at = next;
    }
}

static void access(Thread *thread, const void *address, unsigned long size, bool write, const void *caller) {
    Worker *worker = worker_of(thread);
    // Before the call that returns to there.
    u32 place = (u32)((const char *)caller - worker->base - 1);
    access_memory(static_cast<Lane *>(thread), (uintptr_t)address, size, write, place);
}

static void access_in_line(Lane *lane, const void *address, size_t size, bool write, unsigned line) {
    if (settings().races) access_memory(lane, (uintptr_t)address, size, write, line | 1u << 31);
}

// ---------------------------------------------------------------------------------------------------------------------
// Asynchronous copies

// A copy is done at once or at the wait for its group, by chance: either may be on a GPU.
static void begin_copy(Thread *thread, void *shared, const void *global, bool valid, unsigned line) {
    Lane *lane = static_cast<Lane *>(thread);
    Worker *worker = worker_of(thread);
    if ((uintptr_t)shared % 16 || (valid && (uintptr_t)global % 16)) {
        fatal("cp_async_16 in line %u: an address is misaligned", line);
    }
    if (!in_shared(worker, shared, 16)) fatal("cp_async_16 in line %u: the target does not lie in shared memory", line);
    Copy copy = {shared, global, valid, lane->groups, line};
    access_in_line(lane, shared, 16, true, line);
    if (valid) access_in_line(lane, global, 16, false, line);
    if (mixed(worker->random ^ ((u64)lane->copies_begun++ << 32 | (unsigned)(lane - worker->lanes))) & 1) {
        perform(copy);
    } else {
        lane->copies.push_back(copy);
    }
}

static void commit_copies(Thread *thread) { static_cast<Lane *>(thread)->groups++; }

static void wait_copies(Thread *thread, unsigned groups) {
    Lane *lane = static_cast<Lane *>(thread);
    size_t kept = 0;
    for (const Copy &copy : lane->copies) {
        if (copy.group + groups < lane->groups) {
            perform(copy);
            access_in_line(lane, copy.shared, 16, true, copy.line);
        } else {
            lane->copies[kept++] = copy;
        }
    }
    lane->copies.resize(kept);
}

static void trap(Thread *, const char *message, unsigned line) { fatal("line %u: %s", line, message); }

static const Runtime runtime = {
    barrier, sync_warp, shuffle, vote, whole_warp, begin_copy, commit_copies, wait_copies, trap,
    access,
};

// ---------------------------------------------------------------------------------------------------------------------
// Faults

static struct sigaction old_actions[32];

static void describe_instruction(void *context) {
    ucontext_t *state = (ucontext_t *)context;
#if defined(__x86_64__)
    uintptr_t instruction = (uintptr_t)state->uc_mcontext.gregs[REG_RIP];
#else
    uintptr_t instruction = (uintptr_t)state->uc_mcontext.pc;
#endif
    Dl_info info;
    if (!settings().guards || !dladdr((void *)instruction, &info)) return;
    if (info.dli_fname && strstr(info.dli_fname, "nearfar-module-")) {
        describe_place(instruction - (uintptr_t)info.dli_fbase);
    }
}

static void on_fault(int signal, siginfo_t *info, void *context) {
    Worker *worker = present_worker;
    if (!worker || !worker->current) {
        // Not ours: back to whoever was there before, at the second time.
        sigaction(signal, &old_actions[signal], nullptr);
        return;
    }
    const char *what = signal == SIGSEGV || signal == SIGBUS ? "an illegal memory access"
                       : signal == SIGFPE                    ? "a division by zero"
                                                             : "an illegal instruction (a check of the compiler's)";
    uintptr_t address = (uintptr_t)info->si_addr;
    dprintf(2, "emulated GPU: %s", what);
    if (signal == SIGSEGV || signal == SIGBUS) {
        dprintf(2, " at %p", info->si_addr);
        if (worker->stacks && address - (uintptr_t)worker->stacks < MAX_THREADS * STACK) {
            dprintf(2, ", the stack of a thread is full");
        } else if (memory_mutex.try_lock()) {
            auto next = allocations.upper_bound(address);
            if (next != allocations.begin()) {
                auto before = std::prev(next);
                uintptr_t end = before->first + before->second.size;
                if (address >= end && address - end < 1 << 20) {
                    dprintf(2, ", %zu bytes after the end of an allocation of %zu bytes", (size_t)(address - end),
                            before->second.size);
                }
            }
            if (next != allocations.end() && next->first - address < 1 << 20) {
                dprintf(2, ", %zu bytes before the start of an allocation of %zu bytes",
                        (size_t)(next->first - address), next->second.size);
            }
            memory_mutex.unlock();
        }
    }
    dprintf(2, "\n");
    describe_thread();
    describe_instruction(context);
    _exit(139);
}

static void install_handlers() {
    static std::once_flag once;
    std::call_once(once, [] {
        struct sigaction action = {};
        action.sa_sigaction = on_fault;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
        sigemptyset(&action.sa_mask);
        for (int signal : {SIGSEGV, SIGBUS, SIGFPE, SIGILL}) sigaction(signal, &action, &old_actions[signal]);
    });
}

// A stack for the handler: that of a fiber may be what has overflowed.
static void install_signal_stack() {
    stack_t present;
    if (sigaltstack(nullptr, &present) == 0 && !(present.ss_flags & SS_DISABLE)) return;
    stack_t stack = {};
    stack.ss_size = 64 << 10;
    stack.ss_sp = malloc(stack.ss_size);
    sigaltstack(&stack, nullptr);
}

// ---------------------------------------------------------------------------------------------------------------------
// Launches

static std::mutex &launch_mutex = *new std::mutex; // one launch at a time
static std::vector<std::unique_ptr<Worker>> &workers = *new std::vector<std::unique_ptr<Worker>>;
static std::atomic<u64> launches{0};
static std::atomic<int> lost{SUCCESS}; // the error of a lost context

// What the workers other than the launching thread wait for.
static std::mutex &pool_mutex = *new std::mutex;
static std::condition_variable &pool_wake = *new std::condition_variable;
static std::condition_variable &pool_idle = *new std::condition_variable;
static Launch *pool_launch = nullptr;
static u64 pool_number = 0;
static unsigned pool_active = 0;
static bool pool_started = false;

static bool prepare(Worker *worker, const Launch *launch, std::string *error) {
    Function *function = launch->function;
    const Module::Instance *instance = function->module->instance(worker->number, error);
    if (!instance) return false;
    if (function->kernels.size() <= worker->number) return false;
    const emulation::Kernel *&kernel = function->kernels[worker->number];
    if (!kernel) kernel = (const emulation::Kernel *)dlsym(instance->handle, (function->name + "__kernel").c_str());
    worker->kernel = kernel;
    worker->module = instance->module;
    worker->base = instance->base;
    *instance->module->runtime = &runtime;
    worker->launch = launch;
    worker->first_serial = worker->serial + 1;
    worker->grid = launch->grid;
    worker->threads = launch->threads;
    if (memcmp(&worker->shape, &launch->threads, sizeof(uint3))) {
        worker->shape = launch->threads;
        worker->count = launch->threads.x * launch->threads.y * launch->threads.z;
        worker->warp_count = (worker->count + 31) / 32;
        for (unsigned i = 0; i < worker->count; i++) {
            Lane &lane = worker->lanes[i];
            lane.index.x = i % launch->threads.x;
            lane.index.y = i / launch->threads.x % launch->threads.y;
            lane.index.z = i / launch->threads.x / launch->threads.y;
            lane.lane = i % 32;
            lane.warp = i / 32;
            lane.block = worker;
        }
        for (unsigned i = 0; i < worker->warp_count; i++) {
            unsigned rest = worker->count - i * 32;
            worker->warps[i].present = rest >= 32 ? 0xffffffffu : (1u << rest) - 1;
        }
    }
    if (launch->dynamic && !worker->dynamic_memory) {
        void *memory = mmap(nullptr, DYNAMIC + 2 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory == MAP_FAILED) return false;
        worker->dynamic_memory = (char *)memory + PAGE;
        mprotect(worker->dynamic_memory, DYNAMIC, PROT_READ | PROT_WRITE);
    }
    worker->dynamic_size = launch->dynamic;
    worker->dynamic = nullptr;
    if (launch->dynamic) {
        // As near to the page behind as an alignment to 1,024 bytes allows, or 16 bytes.
        size_t alignment = settings().guards ? 16 : 1024;
        worker->dynamic = worker->dynamic_memory + DYNAMIC - (launch->dynamic + alignment - 1) / alignment * alignment;
    }
    return true;
}

static void work(Worker *worker, const Launch *launch) {
    present_worker = worker;
    // Blocks begin anywhere, and run backwards in every other launch.
    u64 shift = mixed(launch->number + settings().seed) % launch->total;
    for (;;) {
        u64 number = launch->begun->fetch_add(1, std::memory_order_relaxed);
        if (number >= launch->total) break;
        u64 block = number + shift < launch->total ? number + shift : number + shift - launch->total;
        worker->run(launch, launch->number & 1 ? launch->total - 1 - block : block);
    }
    present_worker = nullptr;
}

static void pool_main(Worker *worker) {
    install_signal_stack();
    std::unique_lock<std::mutex> lock(pool_mutex);
    u64 seen = 0;
    for (;;) {
        pool_wake.wait(lock, [&] { return pool_launch && pool_number != seen; });
        seen = pool_number;
        Launch *launch = pool_launch;
        pool_active++;
        lock.unlock();
        std::string error;
        if (!prepare(worker, launch, &error)) fatal("a module is not loaded again: %s", error.c_str());
        work(worker, launch);
        lock.lock();
        if (--pool_active == 0) pool_idle.notify_all();
    }
}

static void make_orders() {
    u64 state = settings().seed;
    for (unsigned i = 0; i < ORDERS; i++) {
        for (unsigned j = 0; j < 32; j++) orders[i][j] = (unsigned char)j;
        for (unsigned j = 31; j > 0; j--) std::swap(orders[i][j], orders[i][mixed(state++) % (j + 1)]);
    }
}

static Result execute(
    Function *function, uint3 grid, uint3 threads, uint3 cluster, unsigned dynamic, void **arguments
) {
    std::lock_guard<std::mutex> lock(launch_mutex);
    if (lost) return (Result)lost.load();
    u64 number = ++launches;
    if (settings().failing_launch && (long long)number >= settings().failing_launch) {
        lost = ILLEGAL_ADDRESS;
        return ILLEGAL_ADDRESS;
    }
    if (workers.empty()) {
        make_orders();
        for (unsigned i = 0; i < settings().workers; i++) {
            workers.emplace_back(new Worker());
            workers.back()->number = i;
        }
        install_handlers();
    }
    install_signal_stack();
    std::atomic<u64> begun{0};
    u64 total = (u64)grid.x * grid.y * grid.z;
    Launch launch = {function, grid, threads, cluster, dynamic, arguments, total, number, &begun};
    Worker *worker = workers[0].get();
    std::string error;
    if (!prepare(worker, &launch, &error)) {
        dprintf(2, "emulated GPU: %s\n", error.c_str());
        return INVALID_IMAGE;
    }
    bool several = workers.size() > 1 && launch.total > 1 && launch.total * worker->count >= 2048;
    if (several) {
        if (!pool_started) {
            pool_started = true;
            for (size_t i = 1; i < workers.size(); i++) std::thread(pool_main, workers[i].get()).detach();
        }
        std::lock_guard<std::mutex> pool_lock(pool_mutex);
        pool_launch = &launch;
        pool_number = number;
        pool_wake.notify_all();
    }
    work(worker, &launch);
    if (several) {
        std::unique_lock<std::mutex> pool_lock(pool_mutex);
        pool_launch = nullptr;
        pool_idle.wait(pool_lock, [] { return pool_active == 0; });
    }
    return SUCCESS;
}

// ---------------------------------------------------------------------------------------------------------------------
// Contexts, streams, captures

struct Context {
    int references = 0;
    bool primary = false;
    unsigned flags = 0;
};

static std::mutex &state_mutex = *new std::mutex;
static std::atomic<bool> initialised{false};
static Context primary_context;

// Plain memory, as a thread's other destructors may still call the driver.
static const int CONTEXTS = 32;
static thread_local Context *context_stack[CONTEXTS];
static thread_local int contexts = 0;

static Context *present_context() { return contexts ? context_stack[contexts - 1] : nullptr; }

static Result push_context(Context *context) {
    if (contexts == CONTEXTS) return OUT_OF_MEMORY;
    context_stack[contexts++] = context;
    return SUCCESS;
}

struct Node {
    int type; // 0: kernel, 1: memcpy, 2: memset, 3: host
    std::function<Result()> run;
};

struct Graph {
    std::vector<std::shared_ptr<Node>> nodes;
};

struct Stream;

struct Capture {
    int mode;
    bool active = true, invalid = false;
    Stream *origin;
    std::thread::id thread;
    u64 id;
    Graph graph;
    std::vector<Stream *> streams;
};

struct Stream {
    unsigned flags = 0;
    int priority = 0;
    bool legacy = false;
    u64 id = 0;
    std::shared_ptr<Capture> capture;
    bool unjoined = false; // has work in a capture of another stream that did not wait for it
    u64 sequence = 0;      // of the last work in a capture
};

struct Event {
    unsigned flags = 0;
    bool recorded = false;
    double milliseconds = 0;
    std::shared_ptr<Capture> capture; // that it was last recorded in
    Stream *stream = nullptr;
    u64 sequence = 0;
};

struct Executable {
    std::vector<std::shared_ptr<Node>> nodes;
};

static Stream legacy_stream, thread_stream;
static std::set<Stream *> &streams = *new std::set<Stream *>;
static std::set<Event *> &events = *new std::set<Event *>;
static std::set<Graph *> &graphs = *new std::set<Graph *>;
static std::set<Executable *> &executables = *new std::set<Executable *>;
static std::vector<std::shared_ptr<Capture>> &captures = *new std::vector<std::shared_ptr<Capture>>;
static u64 next_id = 1;

static double milliseconds_now() {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec * 1e3 + (double)time.tv_nsec * 1e-6;
}

static Result usable() {
    if (!initialised) return NOT_INITIALIZED;
    if (lost) return (Result)lost.load();
    if (!present_context()) return INVALID_CONTEXT;
    return SUCCESS;
}

#define CHECK(expression)                                                                                              \
    do {                                                                                                               \
        Result check_result = (expression);                                                                            \
        if (check_result) return check_result;                                                                         \
    } while (0)
#define USABLE CHECK(usable())

// The caller holds the mutex.
static Result stream_of(void *handle, Stream **stream) {
    if (handle == nullptr || handle == (void *)1) {
        legacy_stream.legacy = true;
        *stream = &legacy_stream;
    } else if (handle == (void *)2) {
        *stream = &thread_stream;
    } else {
        *stream = (Stream *)handle;
        if (!streams.count(*stream)) return INVALID_HANDLE;
    }
    return SUCCESS;
}

// Calls that may not be made while a stream is captured end the capture. The caller holds the mutex.
static Result unsafe_in_capture() {
    Result result = SUCCESS;
    for (auto &capture : captures) {
        bool concerned = capture->mode == 0 || (capture->mode == 1 && capture->thread == std::this_thread::get_id());
        if (concerned) {
            capture->invalid = true;
            result = STREAM_CAPTURE_UNSUPPORTED;
        }
    }
    return result;
}

static Result outside_capture() {
    std::lock_guard<std::mutex> lock(state_mutex);
    return unsafe_in_capture();
}

// Does the work now, or adds it to the graph that the stream is captured into.
static Result submit(void *handle, int type, std::function<Result()> run) {
    {
        std::lock_guard<std::mutex> lock(state_mutex);
        Stream *stream;
        CHECK(stream_of(handle, &stream));
        if (stream->legacy) {
            for (auto &capture : captures) {
                if (!(capture->origin->flags & 1)) {
                    capture->invalid = true;
                    return STREAM_CAPTURE_IMPLICIT;
                }
            }
        }
        if (stream->capture) {
            if (stream->capture->invalid) return STREAM_CAPTURE_INVALIDATED;
            stream->capture->graph.nodes.push_back(std::make_shared<Node>(Node{type, std::move(run)}));
            stream->sequence = next_id++;
            if (stream != stream->capture->origin) stream->unjoined = true;
            return SUCCESS;
        }
    }
    return run();
}

EXPORT Result cuInit(unsigned flags) {
    if (flags) return INVALID_VALUE;
    if (settings().devices <= 0) return NO_DEVICE;
    initialised = true;
    return SUCCESS;
}

EXPORT Result cuDriverGetVersion(int *version) {
    if (!version) return INVALID_VALUE;
    *version = settings().driver_version;
    return SUCCESS;
}

static Result device_check(int device) {
    if (!initialised) return NOT_INITIALIZED;
    return device < 0 || device >= settings().devices ? INVALID_DEVICE : SUCCESS;
}

EXPORT Result cuDeviceGet(int *device, int ordinal) {
    CHECK(device_check(ordinal));
    *device = ordinal;
    return SUCCESS;
}

EXPORT Result cuDeviceGetCount(int *count) {
    if (!initialised && settings().devices > 0) return NOT_INITIALIZED;
    *count = settings().devices > 0 ? settings().devices : 0;
    return SUCCESS;
}

EXPORT Result cuDeviceGetName(char *name, int length, int device) {
    CHECK(device_check(device));
    snprintf(name, (size_t)length, "Emulated GPU");
    return SUCCESS;
}

static Result device_uuid(unsigned char *uuid, int device) {
    CHECK(device_check(device));
    for (int i = 0; i < 16; i++) uuid[i] = (unsigned char)(i + 1);
    uuid[15] = (unsigned char)device;
    return SUCCESS;
}

EXPORT Result cuDeviceGetUuid(unsigned char *uuid, int device) { return device_uuid(uuid, device); }
EXPORT Result cuDeviceGetUuid_v2(unsigned char *uuid, int device) { return device_uuid(uuid, device); }

EXPORT Result cuDeviceTotalMem_v2(size_t *bytes, int device) {
    CHECK(device_check(device));
    *bytes = settings().memory;
    return SUCCESS;
}
EXPORT Result cuDeviceTotalMem(size_t *bytes, int device) { return cuDeviceTotalMem_v2(bytes, device); }

EXPORT Result cuDeviceComputeCapability(int *major, int *minor, int device) {
    CHECK(device_check(device));
    *major = settings().major, *minor = settings().minor;
    return SUCCESS;
}

EXPORT Result cuDeviceGetPCIBusId(char *text, int length, int device) {
    CHECK(device_check(device));
    snprintf(text, (size_t)length, "0000:%02x:00.0", device + 1);
    return SUCCESS;
}

EXPORT Result cuDeviceGetAttribute(int *value, int attribute, int device) {
    if (!value) return INVALID_VALUE;
    CHECK(device_check(device));
    const Settings &s = settings();
    switch (attribute) {
    case 1: *value = 1024; break;                          // threads of a block
    case 2: case 3: *value = 1024; break;                  // its x, y
    case 4: *value = 64; break;                            // its z
    case 5: *value = 0x7fffffff; break;                    // blocks of a grid, x
    case 6: case 7: *value = 65535; break;                 // y, z
    case 8: *value = 48 << 10; break;                      // shared memory of a block
    case 9: *value = 64 << 10; break;                      // constant memory
    case 10: *value = 32; break;                           // warp
    case 11: *value = 0x7fffffff; break;                   // pitch
    case 12: case 82: *value = 65536; break;               // registers
    case 13: *value = 1980000; break;                      // kHz
    case 14: *value = 512; break;                          // alignment of textures
    case 16: *value = s.multiprocessors; break;
    case 17: case 18: case 20: case 32: case 35: *value = 0; break;
    case 15: case 19: case 31: case 41: case 78: case 79: case 80: case 83: case 90: case 95: case 99: case 115:
        *value = 1;
        break;
    case 33: *value = 1 + device; break;
    case 34: case 50: *value = 0; break;
    case 36: *value = 2619000; break;                      // kHz of the memory
    case 37: *value = 5120; break;                         // bits of its bus
    case 38: *value = 50 << 20; break;                     // L2
    case 39: *value = s.multiprocessor_threads(); break;
    case 40: *value = 3; break;                            // copy engines
    case 75: *value = s.major; break;
    case 76: *value = s.minor; break;
    case 81: *value = s.multiprocessor_shared(); break;
    case 97: *value = s.block_shared(); break;
    case 106: *value = s.multiprocessor_blocks(); break;
    case 111: *value = s.architecture() > 75 ? 1 << 10 : 0; break; // reserved shared memory of a block
    case 120: case 127: *value = s.major >= 9; break;      // clusters, tensor maps
    default:
        if (attribute < 1 || attribute > 150) return INVALID_VALUE;
        *value = 0;
    }
    return SUCCESS;
}

// Contexts

EXPORT Result cuDevicePrimaryCtxRetain(Context **context, int device) {
    CHECK(device_check(device));
    std::lock_guard<std::mutex> lock(state_mutex);
    primary_context.primary = true;
    primary_context.references++;
    *context = &primary_context;
    return SUCCESS;
}

EXPORT Result cuDevicePrimaryCtxRelease_v2(int device) {
    CHECK(device_check(device));
    std::lock_guard<std::mutex> lock(state_mutex);
    if (primary_context.references == 0) return INVALID_CONTEXT;
    primary_context.references--;
    return SUCCESS;
}
EXPORT Result cuDevicePrimaryCtxRelease(int device) { return cuDevicePrimaryCtxRelease_v2(device); }

EXPORT Result cuDevicePrimaryCtxReset_v2(int device) { return device_check(device); }

EXPORT Result cuDevicePrimaryCtxSetFlags_v2(int device, unsigned flags) {
    CHECK(device_check(device));
    primary_context.flags = flags;
    return SUCCESS;
}

EXPORT Result cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) {
    CHECK(device_check(device));
    *flags = primary_context.flags;
    *active = primary_context.references > 0;
    return SUCCESS;
}

static Result create_context(Context **context, unsigned flags, int device) {
    CHECK(device_check(device));
    *context = new Context();
    (*context)->flags = flags;
    return push_context(*context);
}

EXPORT Result cuCtxCreate_v2(Context **context, unsigned flags, int device) {
    return create_context(context, flags, device);
}
EXPORT Result cuCtxCreate_v3(Context **context, void *, int, unsigned flags, int device) {
    return create_context(context, flags, device);
}
EXPORT Result cuCtxCreate_v4(Context **context, void *, unsigned flags, int device) {
    return create_context(context, flags, device);
}

EXPORT Result cuCtxDestroy_v2(Context *context) {
    if (!context || context->primary) return INVALID_CONTEXT;
    int kept = 0;
    for (int i = 0; i < contexts; i++) {
        if (context_stack[i] != context) context_stack[kept++] = context_stack[i];
    }
    contexts = kept;
    delete context;
    return SUCCESS;
}

EXPORT Result cuCtxGetCurrent(Context **context) {
    if (!initialised) return NOT_INITIALIZED;
    *context = present_context();
    return SUCCESS;
}

EXPORT Result cuCtxSetCurrent(Context *context) {
    if (!initialised) return NOT_INITIALIZED;
    if (contexts) contexts--;
    return context ? push_context(context) : SUCCESS;
}

EXPORT Result cuCtxPushCurrent_v2(Context *context) {
    if (!initialised) return NOT_INITIALIZED;
    if (!context) return INVALID_CONTEXT;
    return push_context(context);
}

EXPORT Result cuCtxPopCurrent_v2(Context **context) {
    if (!initialised) return NOT_INITIALIZED;
    if (!contexts) return INVALID_CONTEXT;
    if (context) *context = present_context();
    contexts--;
    return SUCCESS;
}

EXPORT Result cuCtxGetDevice(int *device) {
    if (!initialised) return NOT_INITIALIZED;
    if (!present_context()) return INVALID_CONTEXT;
    *device = 0;
    return SUCCESS;
}

EXPORT Result cuCtxSynchronize() {
    USABLE;
    return outside_capture();
}

EXPORT Result cuCtxGetFlags(unsigned *flags) {
    USABLE;
    *flags = present_context()->flags;
    return SUCCESS;
}

EXPORT Result cuCtxSetFlags(unsigned flags) {
    USABLE;
    present_context()->flags = flags;
    return SUCCESS;
}

EXPORT Result cuCtxGetApiVersion(Context *, unsigned *version) {
    *version = (unsigned)settings().driver_version;
    return SUCCESS;
}

static size_t limits[16] = {1024, 1 << 20, 8 << 20};

EXPORT Result cuCtxGetLimit(size_t *value, int limit) {
    USABLE;
    if (limit < 0 || limit >= 7) return UNSUPPORTED_LIMIT;
    *value = limits[limit];
    return SUCCESS;
}

EXPORT Result cuCtxSetLimit(int limit, size_t value) {
    USABLE;
    if (limit < 0 || limit >= 7) return UNSUPPORTED_LIMIT;
    limits[limit] = value;
    return SUCCESS;
}

EXPORT Result cuCtxGetCacheConfig(int *config) {
    USABLE;
    *config = 0;
    return SUCCESS;
}
EXPORT Result cuCtxSetCacheConfig(int) { return usable(); }

EXPORT Result cuCtxGetStreamPriorityRange(int *least, int *greatest) {
    USABLE;
    if (least) *least = 0;
    if (greatest) *greatest = -5;
    return SUCCESS;
}

// Streams and events

EXPORT Result cuStreamCreateWithPriority(Stream **stream, unsigned flags, int priority) {
    USABLE;
    std::lock_guard<std::mutex> lock(state_mutex);
    *stream = new Stream();
    (*stream)->flags = flags;
    (*stream)->priority = priority;
    (*stream)->id = next_id++;
    streams.insert(*stream);
    return SUCCESS;
}

EXPORT Result cuStreamCreate(Stream **stream, unsigned flags) { return cuStreamCreateWithPriority(stream, flags, 0); }

EXPORT Result cuStreamDestroy_v2(Stream *stream) {
    if (lost) return (Result)lost.load();
    std::lock_guard<std::mutex> lock(state_mutex);
    if (!streams.count(stream)) return INVALID_HANDLE;
    if (stream->capture) return STREAM_CAPTURE_UNSUPPORTED;
    streams.erase(stream);
    delete stream;
    return SUCCESS;
}

static Result stream_idle(void *handle) {
    USABLE;
    std::lock_guard<std::mutex> lock(state_mutex);
    Stream *stream;
    CHECK(stream_of(handle, &stream));
    if (stream->capture) {
        stream->capture->invalid = true;
        return STREAM_CAPTURE_UNSUPPORTED;
    }
    if (stream->legacy) {
        for (auto &capture : captures) {
            if (!(capture->origin->flags & 1)) {
                capture->invalid = true;
                return STREAM_CAPTURE_IMPLICIT;
            }
        }
    }
    return SUCCESS;
}

EXPORT Result cuStreamSynchronize(void *handle) { return stream_idle(handle); }
EXPORT Result cuStreamQuery(void *handle) { return stream_idle(handle); }

EXPORT Result cuStreamGetCtx(void *, Context **context) {
    USABLE;
    *context = present_context();
    return SUCCESS;
}

EXPORT Result cuStreamGetFlags(void *handle, unsigned *flags) {
    USABLE;
    std::lock_guard<std::mutex> lock(state_mutex);
    Stream *stream;
    CHECK(stream_of(handle, &stream));
    *flags = stream->flags;
    return SUCCESS;
}

EXPORT Result cuStreamGetPriority(void *handle, int *priority) {
    USABLE;
    std::lock_guard<std::mutex> lock(state_mutex);
    Stream *stream;
    CHECK(stream_of(handle, &stream));
    *priority = stream->priority;
    return SUCCESS;
}

EXPORT Result cuStreamAttachMemAsync(void *, u64, size_t, unsigned) { return usable(); }

EXPORT Result cuEventCreate(Event **event, unsigned flags) {
    USABLE;
    std::lock_guard<std::mutex> lock(state_mutex);
    *event = new Event();
    (*event)->flags = flags;
    events.insert(*event);
    return SUCCESS;
}

EXPORT Result cuEventDestroy_v2(Event *event) {
    if (lost) return (Result)lost.load();
    std::lock_guard<std::mutex> lock(state_mutex);
    if (!events.erase(event)) return INVALID_HANDLE;
    delete event;
    return SUCCESS;
}

EXPORT Result cuEventRecord(Event *event, void *handle) {
    USABLE;
    std::lock_guard<std::mutex> lock(state_mutex);
    Stream *stream;
    CHECK(stream_of(handle, &stream));
    if (!events.count(event)) return INVALID_HANDLE;
    event->recorded = true;
    event->stream = stream;
    event->sequence = next_id++;
    event->capture = stream->capture;
    if (stream->capture && stream->capture->invalid) return STREAM_CAPTURE_INVALIDATED;
    event->milliseconds = milliseconds_now();
    return SUCCESS;
}
EXPORT Result cuEventRecordWithFlags(Event *event, void *handle, unsigned) { return cuEventRecord(event, handle); }

static Result event_done(Event *event) {
    USABLE;
    std::lock_guard<std::mutex> lock(state_mutex);
    if (!events.count(event)) return INVALID_HANDLE;
    if (event->capture) {
        event->capture->invalid = true;
        return CAPTURED_EVENT;
    }
    return SUCCESS;
}

EXPORT Result cuEventQuery(Event *event) { return event_done(event); }
EXPORT Result cuEventSynchronize(Event *event) { return event_done(event); }

static Result elapsed(float *milliseconds, Event *start, Event *end) {
    USABLE;
    std::lock_guard<std::mutex> lock(state_mutex);
    if (!events.count(start) || !events.count(end)) return INVALID_HANDLE;
    if (!start->recorded || !end->recorded || (start->flags | end->flags) & 2) return INVALID_HANDLE;
    if (start->capture || end->capture) return CAPTURED_EVENT;
    *milliseconds = (float)(end->milliseconds - start->milliseconds);
    return SUCCESS;
}

EXPORT Result cuEventElapsedTime(float *milliseconds, Event *start, Event *end) {
    return elapsed(milliseconds, start, end);
}
EXPORT Result cuEventElapsedTime_v2(float *milliseconds, Event *start, Event *end) {
    return elapsed(milliseconds, start, end);
}

EXPORT Result cuStreamWaitEvent(void *handle, Event *event, unsigned) {
    USABLE;
    std::lock_guard<std::mutex> lock(state_mutex);
    Stream *stream;
    CHECK(stream_of(handle, &stream));
    if (!events.count(event)) return INVALID_HANDLE;
    if (!event->recorded) return SUCCESS;
    if (!event->capture) {
        if (!stream->capture) return SUCCESS;
        stream->capture->invalid = true;
        return STREAM_CAPTURE_ISOLATION;
    }
    if (!event->capture->active) return CAPTURED_EVENT;
    if (stream->capture && stream->capture != event->capture) return STREAM_CAPTURE_MERGE;
    if (stream->legacy) return STREAM_CAPTURE_IMPLICIT;
    if (!stream->capture) {
        stream->capture = event->capture;
        stream->capture->streams.push_back(stream);
        stream->unjoined = true;
        stream->sequence = next_id++;
    }
    if (event->stream && event->stream != stream && event->sequence > event->stream->sequence) {
        event->stream->unjoined = false;
    }
    return SUCCESS;
}

EXPORT Result cuStreamBeginCapture_v2(void *handle, int mode) {
    USABLE;
    std::lock_guard<std::mutex> lock(state_mutex);
    Stream *stream;
    CHECK(stream_of(handle, &stream));
    if (stream->legacy) return STREAM_CAPTURE_UNSUPPORTED;
    if (stream->capture || mode < 0 || mode > 2) return ILLEGAL_STATE;
    auto capture = std::make_shared<Capture>();
    capture->mode = mode;
    capture->origin = stream;
    capture->thread = std::this_thread::get_id();
    capture->id = next_id++;
    capture->streams.push_back(stream);
    stream->capture = capture;
    captures.push_back(capture);
    return SUCCESS;
}
EXPORT Result cuStreamBeginCapture(void *handle) { return cuStreamBeginCapture_v2(handle, 0); }

EXPORT Result cuStreamEndCapture(void *handle, Graph **graph) {
    USABLE;
    std::lock_guard<std::mutex> lock(state_mutex);
    Stream *stream;
    CHECK(stream_of(handle, &stream));
    *graph = nullptr;
    std::shared_ptr<Capture> capture = stream->capture;
    if (!capture) return ILLEGAL_STATE;
    if (capture->origin != stream) return STREAM_CAPTURE_UNMATCHED;
    if (capture->mode != 2 && capture->thread != std::this_thread::get_id()) return STREAM_CAPTURE_WRONG_THREAD;
    bool unjoined = false;
    for (Stream *other : capture->streams) {
        if (!streams.count(other) && other != &thread_stream) continue;
        if (other != stream && other->unjoined) unjoined = true;
        other->capture = nullptr;
        other->unjoined = false;
    }
    capture->active = false;
    for (size_t i = 0; i < captures.size(); i++) {
        if (captures[i] == capture) captures.erase(captures.begin() + (long)i);
    }
    if (capture->invalid) return STREAM_CAPTURE_INVALIDATED;
    if (unjoined) return STREAM_CAPTURE_UNJOINED;
    *graph = new Graph(std::move(capture->graph));
    graphs.insert(*graph);
    return SUCCESS;
}

EXPORT Result cuStreamIsCapturing(void *handle, int *status) {
    USABLE;
    std::lock_guard<std::mutex> lock(state_mutex);
    Stream *stream;
    CHECK(stream_of(handle, &stream));
    *status = !stream->capture ? 0 : stream->capture->invalid ? 2 : 1;
    return SUCCESS;
}

EXPORT Result cuStreamGetCaptureInfo_v2(
    void *handle, int *status, u64 *id, Graph **graph, const void **dependencies, size_t *count
) {
    CHECK(cuStreamIsCapturing(handle, status));
    std::lock_guard<std::mutex> lock(state_mutex);
    Stream *stream;
    CHECK(stream_of(handle, &stream));
    if (id) *id = stream->capture ? stream->capture->id : 0;
    if (graph) *graph = stream->capture ? &stream->capture->graph : nullptr;
    if (dependencies) *dependencies = nullptr;
    if (count) *count = 0;
    return SUCCESS;
}

EXPORT Result cuThreadExchangeStreamCaptureMode(int *mode) {
    *mode = 0;
    return NOT_SUPPORTED;
}

// Graphs

EXPORT Result cuGraphCreate(Graph **graph, unsigned) {
    USABLE;
    std::lock_guard<std::mutex> lock(state_mutex);
    *graph = new Graph();
    graphs.insert(*graph);
    return SUCCESS;
}

static Result instantiate(Executable **executable, Graph *graph) {
    USABLE;
    std::lock_guard<std::mutex> lock(state_mutex);
    if (!graphs.count(graph)) return INVALID_VALUE;
    *executable = new Executable{graph->nodes};
    executables.insert(*executable);
    return SUCCESS;
}

EXPORT Result cuGraphInstantiateWithFlags(Executable **executable, Graph *graph, unsigned long long) {
    return instantiate(executable, graph);
}
EXPORT Result cuGraphInstantiate(Executable **executable, Graph *graph, unsigned long long) {
    return instantiate(executable, graph);
}
EXPORT Result cuGraphInstantiate_v2(Executable **executable, Graph *graph, void **, char *, size_t) {
    return instantiate(executable, graph);
}

EXPORT Result cuGraphClone(Graph **clone, Graph *graph) {
    USABLE;
    std::lock_guard<std::mutex> lock(state_mutex);
    if (!graphs.count(graph)) return INVALID_VALUE;
    *clone = new Graph(*graph);
    graphs.insert(*clone);
    return SUCCESS;
}

EXPORT Result cuGraphDestroy(Graph *graph) {
    if (lost) return (Result)lost.load();
    std::lock_guard<std::mutex> lock(state_mutex);
    if (!graphs.erase(graph)) return INVALID_VALUE;
    delete graph;
    return SUCCESS;
}

EXPORT Result cuGraphExecDestroy(Executable *executable) {
    if (lost) return (Result)lost.load();
    std::lock_guard<std::mutex> lock(state_mutex);
    if (!executables.erase(executable)) return INVALID_VALUE;
    delete executable;
    return SUCCESS;
}

EXPORT Result cuGraphUpload(Executable *executable, void *) {
    USABLE;
    std::lock_guard<std::mutex> lock(state_mutex);
    return executables.count(executable) ? SUCCESS : INVALID_VALUE;
}

EXPORT Result cuGraphLaunch(Executable *executable, void *handle) {
    USABLE;
    std::vector<std::shared_ptr<Node>> nodes;
    {
        std::lock_guard<std::mutex> lock(state_mutex);
        if (!executables.count(executable)) return INVALID_VALUE;
        nodes = executable->nodes;
    }
    return submit(handle, 4, [nodes] {
        for (auto &node : nodes) CHECK(node->run());
        return SUCCESS;
    });
}

EXPORT Result cuGraphGetNodes(Graph *graph, void **nodes, size_t *count) {
    USABLE;
    std::lock_guard<std::mutex> lock(state_mutex);
    if (!graphs.count(graph)) return INVALID_VALUE;
    if (nodes) {
        for (size_t i = 0; i < *count; i++) nodes[i] = i < graph->nodes.size() ? graph->nodes[i].get() : nullptr;
    }
    *count = graph->nodes.size();
    return SUCCESS;
}

EXPORT Result cuGraphNodeGetType(Node *node, int *type) {
    *type = node->type;
    return SUCCESS;
}

struct UpdateResult {
    int result;
    void *node, *from;
};

EXPORT Result cuGraphExecUpdate_v2(Executable *executable, Graph *graph, UpdateResult *result) {
    USABLE;
    std::lock_guard<std::mutex> lock(state_mutex);
    if (!executables.count(executable) || !graphs.count(graph)) return INVALID_VALUE;
    bool same = executable->nodes.size() == graph->nodes.size();
    for (size_t i = 0; same && i < graph->nodes.size(); i++) {
        same = executable->nodes[i]->type == graph->nodes[i]->type;
    }
    if (result) *result = {same ? 0 : 2, nullptr, nullptr};
    if (!same) return (Result)910;
    executable->nodes = graph->nodes;
    return SUCCESS;
}

// Memory

EXPORT Result cuMemAlloc_v2(void **pointer, size_t size) {
    USABLE;
    CHECK(outside_capture());
    return allocate(pointer, size, false);
}

EXPORT Result cuMemFree_v2(u64 pointer) {
    USABLE;
    if (!pointer) return SUCCESS;
    CHECK(outside_capture());
    return release(pointer, false);
}

static Result stream_check(void *handle) {
    std::lock_guard<std::mutex> lock(state_mutex);
    Stream *stream;
    CHECK(stream_of(handle, &stream));
    if (stream->capture) {
        stream->capture->invalid = true;
        return STREAM_CAPTURE_UNSUPPORTED;
    }
    return SUCCESS;
}

EXPORT Result cuMemAllocAsync(void **pointer, size_t size, void *stream) {
    USABLE;
    CHECK(stream_check(stream));
    return allocate(pointer, size, false);
}

EXPORT Result cuMemFreeAsync(u64 pointer, void *stream) {
    USABLE;
    if (!pointer) return SUCCESS;
    CHECK(stream_check(stream));
    return release(pointer, false);
}

EXPORT Result cuMemAllocFromPoolAsync(void **pointer, size_t size, void *, void *stream) {
    return cuMemAllocAsync(pointer, size, stream);
}

EXPORT Result cuMemAllocManaged(void **pointer, size_t size, unsigned) { return cuMemAlloc_v2(pointer, size); }

EXPORT Result cuMemHostAlloc(void **pointer, size_t size, unsigned) {
    USABLE;
    CHECK(outside_capture());
    return allocate(pointer, size, true);
}
EXPORT Result cuMemAllocHost_v2(void **pointer, size_t size) { return cuMemHostAlloc(pointer, size, 0); }
EXPORT Result cuMemAllocHost(void **pointer, size_t size) { return cuMemHostAlloc(pointer, size, 0); }

EXPORT Result cuMemFreeHost(void *pointer) {
    USABLE;
    return release((uintptr_t)pointer, true);
}

EXPORT Result cuMemHostGetDevicePointer_v2(u64 *device, void *pointer, unsigned) {
    USABLE;
    *device = (u64)pointer;
    return SUCCESS;
}
EXPORT Result cuMemHostGetFlags(unsigned *flags, void *) {
    USABLE;
    *flags = 0;
    return SUCCESS;
}
EXPORT Result cuMemHostRegister_v2(void *, size_t, unsigned) { return usable(); }
EXPORT Result cuMemHostUnregister(void *) { return usable(); }

EXPORT Result cuMemGetInfo_v2(size_t *free, size_t *total) {
    USABLE;
    std::lock_guard<std::mutex> lock(memory_mutex);
    *free = settings().memory - memory_used;
    *total = settings().memory;
    return SUCCESS;
}

EXPORT Result cuMemGetAddressRange_v2(u64 *base, size_t *size, u64 pointer) {
    USABLE;
    std::lock_guard<std::mutex> lock(memory_mutex);
    auto found = allocation_of(pointer);
    if (found == allocations.end()) return NOT_FOUND;
    if (base) *base = found->first;
    if (size) *size = found->second.size;
    return SUCCESS;
}

enum { HOST_TO_DEVICE = 1, DEVICE_TO_HOST = 2, DEVICE_TO_DEVICE = 3, ANY = 0 };

static Result copy_checked(u64 target, u64 source, size_t size, int kind) {
    if (size == 0) return SUCCESS;
    if ((kind & HOST_TO_DEVICE) && !on_device(target, size)) return INVALID_VALUE;
    if ((kind & DEVICE_TO_HOST) && !on_device(source, size)) return INVALID_VALUE;
    memmove((void *)target, (const void *)source, size);
    return SUCCESS;
}

static Result copy(u64 target, u64 source, size_t size, int kind) {
    USABLE;
    CHECK(outside_capture());
    return copy_checked(target, source, size, kind);
}

static Result copy_async(u64 target, u64 source, size_t size, int kind, void *stream) {
    USABLE;
    return submit(stream, 1, [=] { return copy_checked(target, source, size, kind); });
}

EXPORT Result cuMemcpyHtoD_v2(u64 target, const void *source, size_t size) {
    return copy(target, (u64)source, size, HOST_TO_DEVICE);
}
EXPORT Result cuMemcpyDtoH_v2(void *target, u64 source, size_t size) {
    return copy((u64)target, source, size, DEVICE_TO_HOST);
}
EXPORT Result cuMemcpyDtoD_v2(u64 target, u64 source, size_t size) {
    return copy(target, source, size, DEVICE_TO_DEVICE);
}
EXPORT Result cuMemcpy(u64 target, u64 source, size_t size) { return copy(target, source, size, ANY); }
EXPORT Result cuMemcpyHtoDAsync_v2(u64 target, const void *source, size_t size, void *stream) {
    return copy_async(target, (u64)source, size, HOST_TO_DEVICE, stream);
}
EXPORT Result cuMemcpyDtoHAsync_v2(void *target, u64 source, size_t size, void *stream) {
    return copy_async((u64)target, source, size, DEVICE_TO_HOST, stream);
}
EXPORT Result cuMemcpyDtoDAsync_v2(u64 target, u64 source, size_t size, void *stream) {
    return copy_async(target, source, size, DEVICE_TO_DEVICE, stream);
}
EXPORT Result cuMemcpyAsync(u64 target, u64 source, size_t size, void *stream) {
    return copy_async(target, source, size, ANY, stream);
}
EXPORT Result cuMemcpyPeerAsync(u64 target, Context *, u64 source, Context *, size_t size, void *stream) {
    return copy_async(target, source, size, DEVICE_TO_DEVICE, stream);
}

template <typename T> static Result set_checked(u64 target, T value, size_t count) {
    if (count == 0) return SUCCESS;
    if (target % sizeof(T) || !on_device(target, count * sizeof(T))) return INVALID_VALUE;
    T *p = (T *)target;
    for (size_t i = 0; i < count; i++) p[i] = value;
    return SUCCESS;
}

template <typename T> static Result set(u64 target, T value, size_t count) {
    USABLE;
    CHECK(outside_capture());
    return set_checked(target, value, count);
}

template <typename T> static Result set_async(u64 target, T value, size_t count, void *stream) {
    USABLE;
    return submit(stream, 2, [=] { return set_checked(target, value, count); });
}

EXPORT Result cuMemsetD8_v2(u64 target, unsigned char value, size_t count) { return set(target, value, count); }
EXPORT Result cuMemsetD16_v2(u64 target, unsigned short value, size_t count) { return set(target, value, count); }
EXPORT Result cuMemsetD32_v2(u64 target, unsigned value, size_t count) { return set(target, value, count); }
EXPORT Result cuMemsetD8Async(u64 target, unsigned char value, size_t count, void *stream) {
    return set_async(target, value, count, stream);
}
EXPORT Result cuMemsetD16Async(u64 target, unsigned short value, size_t count, void *stream) {
    return set_async(target, value, count, stream);
}
EXPORT Result cuMemsetD32Async(u64 target, unsigned value, size_t count, void *stream) {
    return set_async(target, value, count, stream);
}

struct Location {
    int type, id;
};

EXPORT Result cuMemPrefetchAsync(u64, size_t, int, void *) { return usable(); }
EXPORT Result cuMemPrefetchAsync_v2(u64, size_t, Location, unsigned, void *) { return usable(); }
EXPORT Result cuMemAdvise(u64, size_t, int, int) { return usable(); }
EXPORT Result cuMemAdvise_v2(u64, size_t, int, Location) { return usable(); }

// The pool of memory is there in name only: freed memory goes back at once.

static char pool;
static u64 pool_threshold = 0;

EXPORT Result cuDeviceGetDefaultMemPool(void **result, int device) {
    CHECK(device_check(device));
    *result = &pool;
    return SUCCESS;
}
EXPORT Result cuDeviceGetMemPool(void **result, int device) { return cuDeviceGetDefaultMemPool(result, device); }
EXPORT Result cuDeviceSetMemPool(int device, void *) { return device_check(device); }
EXPORT Result cuMemPoolCreate(void **result, const void *) {
    *result = &pool;
    return usable();
}
EXPORT Result cuMemPoolDestroy(void *) { return usable(); }
EXPORT Result cuMemPoolTrimTo(void *, size_t) { return usable(); }

EXPORT Result cuMemPoolSetAttribute(void *, int attribute, void *value) {
    USABLE;
    if (attribute == 4) memcpy(&pool_threshold, value, sizeof(pool_threshold));
    return attribute >= 1 && attribute <= 8 ? SUCCESS : INVALID_VALUE;
}

EXPORT Result cuMemPoolGetAttribute(void *, int attribute, void *value) {
    USABLE;
    if (attribute < 1 || attribute > 8) return INVALID_VALUE;
    if (attribute <= 3) {
        *(int *)value = 1;
    } else {
        std::lock_guard<std::mutex> lock(memory_mutex);
        *(u64 *)value = attribute == 4 ? pool_threshold : memory_used;
    }
    return SUCCESS;
}

EXPORT Result cuPointerGetAttribute(void *value, int attribute, u64 pointer) {
    USABLE;
    std::lock_guard<std::mutex> lock(memory_mutex);
    auto found = allocation_of(pointer);
    if (found == allocations.end()) return INVALID_VALUE;
    switch (attribute) {
    case 1: *(Context **)value = &primary_context; break;
    case 2: *(unsigned *)value = found->second.host ? 1 : 2; break;
    case 3: *(u64 *)value = pointer; break;
    case 4:
        if (!found->second.host) return INVALID_VALUE;
        *(u64 *)value = pointer;
        break;
    case 6: *(unsigned *)value = 0; break;
    case 7: *(u64 *)value = found->second.id; break;
    case 8: *(unsigned char *)value = 0; break;
    case 9: *(int *)value = 0; break;
    case 11: *(u64 *)value = found->first; break;
    case 12: *(size_t *)value = found->second.size; break;
    case 13: *(unsigned char *)value = 1; break;
    default: return INVALID_VALUE;
    }
    return SUCCESS;
}

EXPORT Result cuPointerGetAttributes(unsigned count, int *attributes, void **values, u64 pointer) {
    USABLE;
    for (unsigned i = 0; i < count; i++) {
        if (cuPointerGetAttribute(values[i], attributes[i], pointer)) memset(values[i], 0, 4);
    }
    return SUCCESS;
}

// Modules

// A module for sm_XY runs on devices of the same major and at least the same minor number, one for sm_XYa on exactly
// this device; PTX for compute_XY runs on all devices from there on.
static bool runs_here(const char *architecture) {
    bool ptx = *architecture == 'p';
    int number = atoi(architecture + ptx), present = settings().architecture();
    char suffix = architecture[strlen(architecture) - 1];
    if (suffix == 'a') return number == present;
    if (suffix == 'f') return number / 10 == present / 10 && number <= present;
    if (ptx) return number <= present;
    return number / 10 == present / 10 && number <= present;
}

static int digit(char c) { return c >= 'a' ? c - 'a' + 10 : c - '0'; }

EXPORT Result cuModuleLoadData(Module **result, const void *image) {
    USABLE;
    CHECK(outside_capture());
    if (!result || !image) return INVALID_VALUE;
    std::unique_ptr<Module> module(new Module());
    const char *text = (const char *)image;
    static const char PTX[] = "// PTX of the emulation: ";
    if (!memcmp(image, ELFMAG, SELFMAG)) {
        // The section headers lie at the end.
        const Elf64_Ehdr *header = (const Elf64_Ehdr *)image;
        module->image.assign(text, header->e_shoff + (size_t)header->e_shnum * header->e_shentsize);
    } else if (!strncmp(text, PTX, sizeof(PTX) - 1)) {
        const char *digits = text + sizeof(PTX) - 1;
        size_t length = strlen(digits);
        for (size_t i = 0; i + 1 < length && digits[i] > ' '; i += 2) {
            module->image += (char)(digit(digits[i]) << 4 | digit(digits[i + 1]));
        }
    } else {
        return INVALID_IMAGE;
    }
    std::string error;
    const Module::Instance *instance = module->instance(0, &error);
    if (!instance) {
        dprintf(2, "emulated GPU: %s\n", error.c_str());
        return INVALID_IMAGE;
    }
    // Of another version of the emulation, or compiled without the checks that are asked for now, or with them.
    unsigned long version = EMULATION_VERSION * 4 + settings().races * 2 + settings().guards;
    if (instance->module->version != version) return NO_BINARY_FOR_GPU;
    if (!runs_here(instance->module->architecture)) return NO_BINARY_FOR_GPU;
    *result = module.release();
    std::lock_guard<std::mutex> lock(modules_mutex);
    modules.insert(*result);
    return SUCCESS;
}

EXPORT Result cuModuleLoadDataEx(Module **module, const void *image, unsigned, int *, void **) {
    return cuModuleLoadData(module, image);
}

EXPORT Result cuModuleLoad(Module **module, const char *path) {
    USABLE;
    FILE *file = fopen(path, "rb");
    if (!file) return FILE_NOT_FOUND;
    std::string image;
    char buffer[4096];
    for (size_t count; (count = fread(buffer, 1, sizeof(buffer), file));) image.append(buffer, count);
    fclose(file);
    if (image.size() < sizeof(Elf64_Ehdr)) return INVALID_IMAGE;
    return cuModuleLoadData(module, image.c_str());
}

EXPORT Result cuModuleUnload(Module *module) {
    USABLE;
    {
        std::lock_guard<std::mutex> lock(modules_mutex);
        if (!modules.erase(module)) return INVALID_HANDLE;
    }
    std::lock_guard<std::mutex> lock(launch_mutex);
    delete module;
    return SUCCESS;
}

EXPORT Result cuModuleGetFunction(Function **result, Module *module, const char *name) {
    USABLE;
    std::string error;
    const Module::Instance *instance = module->instance(0, &error);
    if (!instance) return INVALID_HANDLE;
    auto kernel = (const emulation::Kernel *)dlsym(instance->handle, (std::string(name) + "__kernel").c_str());
    if (!kernel) return NOT_FOUND;
    std::lock_guard<std::mutex> lock(module->mutex);
    std::unique_ptr<Function> &function = module->functions[name];
    if (!function) {
        function.reset(new Function());
        function->module = module;
        function->name = name;
        function->kernel = kernel;
        function->kernels.resize(settings().workers);
        function->static_shared = (int)(instance->module->shared_end - instance->module->shared);
        function->dynamic_limit = (48 << 10) - function->static_shared;
    }
    *result = function.get();
    return SUCCESS;
}

EXPORT Result cuModuleGetGlobal_v2(void **, size_t *, Module *, const char *) {
    USABLE;
    return NOT_FOUND;
}

EXPORT Result cuFuncGetModule(Module **module, Function *function) {
    USABLE;
    *module = function->module;
    return SUCCESS;
}

EXPORT Result cuFuncGetName(const char **name, Function *function) {
    USABLE;
    *name = function->name.c_str();
    return SUCCESS;
}

EXPORT Result cuFuncGetParamInfo(Function *function, size_t number, size_t *offset, size_t *size) {
    USABLE;
    if (number >= function->kernel->count) return INVALID_VALUE;
    size_t place = 0;
    for (size_t i = 0;; i++) {
        size_t bytes = function->kernel->sizes[i], alignment = bytes >= 8 ? 8 : bytes ? bytes : 1;
        place = (place + alignment - 1) / alignment * alignment;
        if (i == number) break;
        place += bytes;
    }
    if (offset) *offset = place;
    if (size) *size = function->kernel->sizes[number];
    return SUCCESS;
}

EXPORT Result cuFuncGetAttribute(int *value, int attribute, Function *function) {
    USABLE;
    switch (attribute) {
    case 0: *value = function->kernel->threads ? (int)function->kernel->threads : 1024; break;
    case 1: *value = function->static_shared; break;
    case 2: case 3: *value = 0; break;
    case 4: *value = 32; break;
    case 5: case 6: *value = settings().architecture(); break;
    case 8: *value = function->dynamic_limit; break;
    default:
        if (attribute < 0 || attribute > 16) return INVALID_VALUE;
        *value = 0;
    }
    return SUCCESS;
}

EXPORT Result cuFuncSetAttribute(Function *function, int attribute, int value) {
    USABLE;
    if (attribute == 8) {
        if (value < 0 || value + function->static_shared > settings().block_shared()) return INVALID_VALUE;
        function->dynamic_limit = value;
        return SUCCESS;
    }
    return attribute >= 9 && attribute <= 15 ? SUCCESS : INVALID_VALUE;
}

EXPORT Result cuFuncSetCacheConfig(Function *, int) { return usable(); }
EXPORT Result cuFuncSetSharedMemConfig(Function *, int) { return usable(); }

// Launches

static Result launch(
    Function *function, uint3 grid, uint3 threads, uint3 cluster, unsigned dynamic, void *stream, void **arguments,
    void **extra
) {
    USABLE;
    if (!function) return INVALID_HANDLE;
    if (extra) return NOT_SUPPORTED;
    if (!grid.x || !grid.y || !grid.z || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) {
        return INVALID_VALUE;
    }
    if (!threads.x || !threads.y || !threads.z || threads.x > 1024 || threads.y > 1024 || threads.z > 64) {
        return INVALID_VALUE;
    }
    unsigned count = threads.x * threads.y * threads.z;
    if (count > MAX_THREADS) return INVALID_VALUE;
    if (function->kernel->threads && count > function->kernel->threads) return INVALID_VALUE;
    if (dynamic > 0 && (long long)dynamic > function->dynamic_limit) return INVALID_VALUE;
    if (grid.x % cluster.x || grid.y % cluster.y || grid.z % cluster.z) return INVALID_VALUE;
    if (cluster.x * cluster.y * cluster.z > 16) return INVALID_CLUSTER_SIZE;
    if (function->kernel->count && !arguments) return INVALID_VALUE;
    // The arguments' bytes are taken now, as a graph may be run at any later time.
    for (unsigned i = 0; i < function->kernel->count; i++) {
        if (!arguments[i]) return INVALID_VALUE;
    }
    struct Arguments {
        std::vector<char> bytes;
        std::vector<void *> pointers;
    };
    auto kept = std::make_shared<Arguments>();
    size_t total = 64;
    for (unsigned i = 0; i < function->kernel->count; i++) total += (function->kernel->sizes[i] + 63) / 64 * 64;
    kept->bytes.resize(total);
    char *place = (char *)(((uintptr_t)kept->bytes.data() + 63) & ~(uintptr_t)63);
    for (unsigned i = 0; i < function->kernel->count; i++) {
        memcpy(place, arguments[i], function->kernel->sizes[i]);
        kept->pointers.push_back(place);
        place += (function->kernel->sizes[i] + 63) / 64 * 64;
    }
    return submit(stream, 0, [=] {
        return execute(function, grid, threads, cluster, dynamic, kept->pointers.data());
    });
}

EXPORT Result cuLaunchKernel(
    Function *function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned x, unsigned y, unsigned z,
    unsigned dynamic, void *stream, void **arguments, void **extra
) {
    return launch(function, {grid_x, grid_y, grid_z}, {x, y, z}, {1, 1, 1}, dynamic, stream, arguments, extra);
}

EXPORT Result cuLaunchCooperativeKernel(
    Function *function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned x, unsigned y, unsigned z,
    unsigned dynamic, void *stream, void **arguments
) {
    return launch(function, {grid_x, grid_y, grid_z}, {x, y, z}, {1, 1, 1}, dynamic, stream, arguments, nullptr);
}

struct LaunchAttribute {
    unsigned id;
    char pad[4];
    union {
        char bytes[64];
        uint3 cluster;
    };
};

struct LaunchConfiguration {
    uint3 grid, threads;
    unsigned dynamic;
    void *stream;
    LaunchAttribute *attributes;
    unsigned count;
};

EXPORT Result cuLaunchKernelEx(
    const LaunchConfiguration *configuration, Function *function, void **arguments, void **extra
) {
    uint3 cluster = {1, 1, 1};
    for (unsigned i = 0; i < configuration->count; i++) {
        if (configuration->attributes[i].id == 4) cluster = configuration->attributes[i].cluster;
    }
    if (!cluster.x || !cluster.y || !cluster.z) return INVALID_VALUE;
    return launch(function, configuration->grid, configuration->threads, cluster, configuration->dynamic,
                  configuration->stream, arguments, extra);
}

EXPORT Result cuLaunchHostFunc(void *stream, void (*function)(void *), void *data) {
    USABLE;
    return submit(stream, 3, [=] {
        function(data);
        return SUCCESS;
    });
}

// Occupancy

EXPORT Result cuOccupancyMaxActiveBlocksPerMultiprocessor(
    int *blocks, Function *function, int threads, size_t dynamic
) {
    USABLE;
    if (threads < 1 || threads > 1024) return INVALID_VALUE;
    const Settings &s = settings();
    int warps = (threads + 31) / 32;
    int count = s.multiprocessor_threads() / (warps * 32);
    if (count > s.multiprocessor_blocks()) count = s.multiprocessor_blocks();
    size_t shared = (size_t)function->static_shared + dynamic + (s.architecture() > 75 ? 1 << 10 : 0);
    if (shared && (size_t)s.multiprocessor_shared() / shared < (size_t)count) {
        count = (int)((size_t)s.multiprocessor_shared() / shared);
    }
    *blocks = count;
    return SUCCESS;
}

EXPORT Result cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
    int *blocks, Function *function, int threads, size_t dynamic, unsigned
) {
    return cuOccupancyMaxActiveBlocksPerMultiprocessor(blocks, function, threads, dynamic);
}

EXPORT Result cuOccupancyAvailableDynamicSMemPerBlock(size_t *size, Function *function, int blocks, int) {
    USABLE;
    if (blocks < 1) return INVALID_VALUE;
    int shared = settings().multiprocessor_shared() / blocks - 1024 - function->static_shared;
    *size = shared > 0 ? (size_t)shared : 0;
    return SUCCESS;
}

EXPORT Result cuOccupancyMaxPotentialBlockSizeWithFlags(
    int *grid, int *threads, Function *function, size_t (*)(int), size_t, int limit, unsigned
) {
    USABLE;
    *threads = function->kernel->threads ? (int)function->kernel->threads : 1024;
    if (limit > 0 && *threads > limit) *threads = limit;
    *grid = settings().multiprocessors * (settings().multiprocessor_threads() / *threads);
    return SUCCESS;
}

EXPORT Result cuOccupancyMaxPotentialBlockSize(
    int *grid, int *threads, Function *function, size_t (*shared)(int), size_t dynamic, int limit
) {
    return cuOccupancyMaxPotentialBlockSizeWithFlags(grid, threads, function, shared, dynamic, limit, 0);
}

EXPORT Result cuOccupancyMaxPotentialClusterSize(int *size, Function *, const LaunchConfiguration *) {
    USABLE;
    *size = settings().major >= 9 ? 8 : 1;
    return SUCCESS;
}

EXPORT Result cuOccupancyMaxActiveClusters(int *clusters, Function *, const LaunchConfiguration *configuration) {
    USABLE;
    uint3 cluster = {1, 1, 1};
    for (unsigned i = 0; i < configuration->count; i++) {
        if (configuration->attributes[i].id == 4) cluster = configuration->attributes[i].cluster;
    }
    *clusters = settings().multiprocessors / (int)(cluster.x * cluster.y * cluster.z);
    return SUCCESS;
}

// Tensor maps: the rules of the manual, and the arguments as they are.

EXPORT Result cuTensorMapEncodeTiled(
    emulation::TensorMap *map, int type, unsigned rank, void *address, const u64 *dimensions, const u64 *strides,
    const u32 *box, const u32 *element_strides, int interleave, int swizzle, int promotion, int fill
) {
    static const unsigned SIZES[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4};
    if (!map || (uintptr_t)map % 64 || rank < 1 || rank > 5 || type < 0 || type > 12) return INVALID_VALUE;
    if ((uintptr_t)address % 16 || interleave < 0 || interleave > 2 || swizzle < 0 || swizzle > 3) return INVALID_VALUE;
    if (interleave == 2 && (uintptr_t)address % 32) return INVALID_VALUE;
    if (interleave && rank < 3) return INVALID_VALUE;
    emulation::TensorMap result = {};
    result.magic = emulation::TensorMap::MAGIC;
    result.address = (u64)address;
    for (unsigned i = 0; i < rank; i++) {
        if (!dimensions[i] || dimensions[i] > 1ull << 32) return INVALID_VALUE;
        if (!box[i] || box[i] > 256) return INVALID_VALUE;
        if (!element_strides[i] || element_strides[i] > 8) return INVALID_VALUE;
        result.dimensions[i] = dimensions[i];
        result.box[i] = (unsigned short)box[i];
        result.element_strides[i] = (unsigned char)element_strides[i];
    }
    for (unsigned i = 0; i + 1 < rank; i++) {
        if (strides[i] % 16 || strides[i] >= 1ull << 40) return INVALID_VALUE;
        result.strides[i] = strides[i];
    }
    unsigned inner = box[0] * SIZES[type];
    if (!interleave && inner % 16) return INVALID_VALUE;
    if (!interleave && swizzle && inner > 16u << swizzle) return INVALID_VALUE;
    if (interleave == 2 && swizzle != 1) return INVALID_VALUE;
    result.type = (unsigned char)type;
    result.rank = (unsigned char)rank;
    result.interleave = (unsigned char)interleave;
    result.swizzle = (unsigned char)swizzle;
    result.promotion = (unsigned char)promotion;
    result.fill = (unsigned char)fill;
    memcpy((void *)map, &result, sizeof(result));
    return SUCCESS;
}

// The rest

EXPORT Result cuProfilerStart() { return usable(); }
EXPORT Result cuProfilerStop() { return usable(); }

EXPORT Result cuGetProcAddress_v2(const char *symbol, void **function, int, u64, int *status) {
    *function = nullptr;
    for (const char *suffix : {"_v2", "", "_v3"}) {
        *function = dlsym(RTLD_DEFAULT, (std::string(symbol) + suffix).c_str());
        if (!*function) {
            Dl_info info;
            if (dladdr((void *)&cuInit, &info)) {
                void *self = dlopen(info.dli_fname, RTLD_NOW | RTLD_NOLOAD);
                if (self) *function = dlsym(self, (std::string(symbol) + suffix).c_str());
            }
        }
        if (*function) break;
    }
    if (status) *status = *function ? 0 : 1;
    return *function ? SUCCESS : NOT_FOUND;
}

EXPORT Result cuGetProcAddress(const char *symbol, void **function, int version, u64 flags) {
    return cuGetProcAddress_v2(symbol, function, version, flags, nullptr);
}
