// The emulation's version of kernels/shared/hopper.cuh: the same functions, as late and as early as a GPU may be.
//
// A thread that has to wait goes to the block's barrier, of line 0: when all threads of the block are there, a round is
// over, and each looks again. What happens in a round is seen in the next one, so that the threads of a warp go on
// together. A thread that has ended goes on coming to the barrier. So nobody may wait in an operation of its warp, or
// in __syncthreads(), for a thread that waits here: the warp's threads wait together, or the others have ended.
//
// A copy is done when it is asked for, when its barrier is waited for, or when otherwise nothing would go on, by
// chance; its bytes may be written long before its barrier is told. A product is done when it is waited for, by each
// warp for itself, and reads shared memory as it is then. Until then its sums are no numbers, and must stay untouched.
//
// What a kernel gets wrong is told by a message as far as it can be seen: barriers that were not begun or get too many
// arrivals, sums without a fence, warps of a warpgroup that disagree, copies and products nobody waits for, threads
// that wait for each other. Clusters have one block.

#pragma once

#include "instructions.cuh"
#include "types.cuh"

struct alignas(64) CUtensorMap {
    u64 words[16];
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

extern "C" {
void *calloc(size_t, size_t);
char *getenv(const char *);
unsigned long long strtoull(const char *, char **, int);
int snprintf(char *, size_t, const char *, ...);
int dprintf(int, const char *, ...);
}

namespace emulation {

// The 8 bytes of a barrier.
struct Phases {
    u64 expected : 12, pending : 12;
    long bytes : 23;
    u64 phase : 1;
    u64 changed : 13; // the round in which the last phase was over
    u64 magic : 3;
};
static_assert(sizeof(Phases) == 8, "a barrier has 8 bytes");

// A copy under way.
struct BoxCopy {
    TensorMap map;
    int column, row;
    unsigned to, barrier, line;
    bool written;
};

// A product of a warp under way. What the lanes bring is found by its number.
struct Product {
    u64 a, b;
    unsigned number, group, width, line;
    bool a_across, b_across, bf16, add;
    float *sums[32]; // as they were, or with what was added since
};

// The sums of a lane that products under way are added to.
struct alignas(64) Sums {
    float *place;
    unsigned width, last; // floats; the number of the last product behind which they are free
    float values[128];
};

struct HopperLane {
    unsigned rounds;
    u64 seen; // the progress that it last saw
    unsigned stuck;
    const char *what; // it waits for
    unsigned where, parity, line;
    unsigned products, groups;
    bool fenced, ended;
    Sums *sums[4];
    unsigned sums_count;
};

struct NamedBarrier {
    unsigned arrived, expected, generation, changed;
};

struct Hopper {
    static const unsigned COPIES = 512, PRODUCTS = 64;
    bool begun, active, unfenced;
    unsigned ended, gone, last; // the round in which the last one has ended
    u64 progress, random;
    unsigned copies_count;
    BoxCopy copies[COPIES];
    NamedBarrier named[16];
    // Of a warp: products by their number, and how many were done; of a warpgroup, those of the warp that came first.
    Product products[32][PRODUCTS];
    unsigned done[32], told[32];
    Product first[8][PRODUCTS];
    HopperLane lanes[1024];
    // For a product while it is done: the stacks of threads are short.
    float left[16][16], right[16 * 256], sums[16 * 256];
};

// Not zero, so that it does not lie where the shared memory does.
static Hopper *hopper_memory = (Hopper *)1;

// Zeros, at a multiple of 64 bytes, for ever.
static inline void *hopper_allocate(size_t size) {
    return (void *)(((size_t)calloc(1, size + 64) + 63) / 64 * 64);
}

static inline Hopper &hopper() { return *hopper_memory; }

static inline unsigned lane_number() { return threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z); }

static inline HopperLane &hopper_lane() { return hopper().lanes[lane_number()]; }

static __noinline__ void hopper_trap(unsigned line, const char *format, u64 a = 0, u64 b = 0, u64 c = 0) {
    char text[400];
    snprintf(text, sizeof(text), format, a, b, c);
    runtime->trap(thread, text, line);
}

static inline u64 hopper_random() {
    u64 x = hopper().random += 0x9e3779b97f4a7c15ull;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ x >> 27) * 0x94d049bb133111ebull;
    return x ^ x >> 31;
}

// Called by each function of this file.
static inline HopperLane &hopper_use(unsigned line) {
    Hopper &h = hopper();
    if (!h.active) {
        if (h.ended) hopper_trap(line, "%llu threads have ended before the first instruction of Hopper", h.ended);
        h.active = true;
    }
    HopperLane &lane = hopper_lane();
    lane.line = line;
    return lane;
}

// ---------------------------------------------------------------------------------------------------------------------
// Shared memory

static inline unsigned shared_begin() { return 1024; }
static inline unsigned dynamic_begin() {
    unsigned size = (unsigned)(_end - __bss_start);
    return 1024 + (size + 1023) / 1024 * 1024 + (unsigned)((size_t)thread->block->dynamic % 1024);
}

static inline char *shared_pointer(unsigned place, unsigned size, unsigned line) {
    unsigned begin = dynamic_begin(), length = thread->block->dynamic_size;
    if (place >= begin && place + size <= begin + length) return (char *)thread->block->dynamic + (place - begin);
    if (place >= shared_begin() && place + size <= shared_begin() + (unsigned)(_end - __bss_start)) {
        return __bss_start + (place - shared_begin());
    }
    hopper_trap(line, "%llu bytes at %#llx do not lie in shared memory", size, place);
    return nullptr;
}

// Swizzles: mode 0 for none, 1, 2 and 3 for rows of 128, 64 and 32 bytes. The bits of an address above 128 bytes by
// which pieces of 16 bytes are exchanged, and where a byte is then.
static inline unsigned turn_of(unsigned place, unsigned mode) {
    static const unsigned MASKS[] = {0, 7, 3, 1};
    return place >> 7 & MASKS[mode];
}

static inline unsigned swizzled(unsigned place, unsigned mode) { return place ^ turn_of(place, mode) << 4; }

// ---------------------------------------------------------------------------------------------------------------------
// Rounds

static __noinline__ void hopper_deadlock(unsigned line) {
    Hopper &h = hopper();
    unsigned count = blockDim.x * blockDim.y * blockDim.z;
    dprintf(2, "emulated GPU: the threads of a block wait for each other:\n");
    for (unsigned i = 0, j; i < count; i = j) {
        HopperLane &lane = h.lanes[i];
        for (j = i + 1; j < count; j++) {
            HopperLane &other = h.lanes[j];
            if (other.ended != lane.ended || other.what != lane.what || other.where != lane.where) break;
            if (other.line != lane.line || other.parity != lane.parity) break;
        }
        if (lane.ended || !lane.what) {
            dprintf(2, "  threads %u to %u have ended\n", i, j - 1);
        } else {
            dprintf(2, "  threads %u to %u wait in line %u for %s %#x, %u\n", i, j - 1, lane.line, lane.what,
                    lane.where, lane.parity);
        }
    }
    for (unsigned i = 0; i < h.copies_count; i++) {
        dprintf(2, "  a copy of line %u for the barrier %#x is under way\n", h.copies[i].line, h.copies[i].barrier);
    }
    hopper_trap(line, "nothing goes on");
}

static inline void hopper_round() {
    HopperLane &lane = hopper_lane();
    __syncthreads(0u);
    lane.rounds++;
}

// Whether nothing has happened since this thread last asked. Too often, and it never will.
static inline bool hopper_stuck(HopperLane &lane) {
    Hopper &h = hopper();
    if (lane.seen != h.progress) {
        lane.seen = h.progress;
        lane.stuck = 0;
        return false;
    }
    if (++lane.stuck > 8) hopper_deadlock(lane.line);
    return true;
}

static inline void hopper_passed(HopperLane &lane) {
    hopper().progress++;
    lane.what = nullptr;
    lane.stuck = 0;
}

// ---------------------------------------------------------------------------------------------------------------------
// Barriers

static inline Phases *phases_at(unsigned barrier, unsigned line) {
    if (barrier % 8) hopper_trap(line, "the barrier %#llx is misaligned", barrier);
    Phases *phases = (Phases *)shared_pointer(barrier, 8, line);
    if (phases->magic != 5) hopper_trap(line, "there is no barrier at %#llx", barrier);
    return phases;
}

static inline void advance(Phases *phases) {
    hopper().progress++;
    if (phases->pending || phases->bytes) return;
    phases->pending = phases->expected;
    phases->phase ^= 1;
    phases->changed = hopper_lane().rounds;
}

static inline void arrive(unsigned barrier, long bytes, unsigned line) {
    Phases *phases = phases_at(barrier, line);
    if (!phases->pending) hopper_trap(line, "too many arrivals at the barrier %#llx, which waits for bytes", barrier);
    if (phases->bytes + bytes >= 1 << 20) hopper_trap(line, "the barrier %#llx waits for too many bytes", barrier);
    phases->bytes += bytes;
    phases->pending--;
    advance(phases);
}

// Whether the phase of a parity was over when the round began.
static inline bool is_over(const Phases *phases, unsigned parity, unsigned round) {
    return phases->phase != parity && phases->changed != (round & 0x1fff);
}

// ---------------------------------------------------------------------------------------------------------------------
// Copies

static inline void write_box(const BoxCopy &copy) {
    static const unsigned SIZES[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4};
    const TensorMap &map = copy.map;
    unsigned size = SIZES[map.type], row_bytes = map.box[0] * size;
    // Modes of swizzling are counted the other way round here.
    unsigned mode = map.swizzle ? 4 - map.swizzle : 0;
    if (mode && row_bytes != 16u << map.swizzle) hopper_trap(copy.line, "a box is narrower than its swizzle");
    for (unsigned r = 0; r < map.box[1]; r++) {
        long row = (long)copy.row + r;
        const char *from = (const char *)map.address + row * (long)map.strides[0];
        for (unsigned at = 0; at < row_bytes; at += 16) {
            char piece[16] = {};
            long first = copy.column + (long)(at / size), columns = (long)map.dimensions[0];
            if (row >= 0 && row < (long)map.dimensions[1]) {
                long begin = first < 0 ? -first : 0;
                long end = first + (long)(16 / size) > columns ? columns - first : (long)(16 / size);
                if (begin < end) memcpy(piece + begin * size, from + (first + begin) * size, (end - begin) * size);
            }
            memcpy(shared_pointer(swizzled(copy.to + r * row_bytes + at, mode), 16, copy.line), piece, 16);
        }
    }
}

static inline unsigned box_bytes(const BoxCopy &copy) {
    static const unsigned SIZES[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4};
    return copy.map.box[0] * copy.map.box[1] * SIZES[copy.map.type];
}

static inline void finish_copy(BoxCopy &copy) {
    if (!copy.written) write_box(copy);
    Phases *phases = phases_at(copy.barrier, copy.line);
    phases->bytes -= box_bytes(copy);
    advance(phases);
}

// Finishes copies that a barrier waits for: all, or each by chance.
static inline void finish_copies(unsigned barrier, bool all) {
    Hopper &h = hopper();
    unsigned kept = 0;
    // In the order in which they were asked for, or backwards.
    bool backwards = hopper_random() & 1;
    for (unsigned i = 0; i < h.copies_count; i++) {
        BoxCopy &copy = h.copies[backwards ? h.copies_count - 1 - i : i];
        if (copy.barrier == barrier && (all || hopper_random() & 1)) {
            finish_copy(copy);
            copy.barrier = ~0u;
        }
    }
    for (unsigned i = 0; i < h.copies_count; i++) {
        if (h.copies[i].barrier != ~0u) {
            if (kept != i) h.copies[kept] = h.copies[i];
            kept++;
        }
    }
    h.copies_count = kept;
}

static inline void check_map(const CUtensorMap &map, unsigned line) {
    if ((size_t)&map % 64) hopper_trap(line, "a tensor map is misaligned");
    if (((const TensorMap *)&map)->magic != TensorMap::MAGIC) hopper_trap(line, "this is no tensor map");
}

// ---------------------------------------------------------------------------------------------------------------------
// Products

typedef float Eight __attribute__((vector_size(32), aligned(4)));

static inline Eight eight_of(const char *from, bool bf16) {
    u16 bits[8];
    memcpy(bits, from, 16);
    Eight result;
#ifdef __F16C__
    typedef short Halves __attribute__((vector_size(16)));
    if (!bf16) {
        Halves halves;
        memcpy(&halves, bits, 16);
        return __builtin_ia32_vcvtph2ps256(halves);
    }
#endif
    for (int i = 0; i < 8; i++) result[i] = bf16 ? of_bf16(bits[i]) : of_f16(bits[i]);
    return result;
}

// Lines of a matrix that is described, each with 16 inner places, from one on: the canonical layouts. Where inner
// places are next to each other, 8 lines are a block: its rows are as long as the swizzle, and blocks are `stride`
// apart; without a swizzle, the two halves of inner places are `leading` apart. Where lines are next to each other, a
// row is as many lines as the swizzle is long, 8 inner places are a block: those of further inner places are `stride`
// apart, those of further lines `leading`; without a swizzle it is the other way round.
static inline void read_matrix(
    float *to, unsigned to_line, unsigned to_place, u64 descriptor, bool across, bool bf16, unsigned first,
    unsigned count, unsigned line
) {
    unsigned start = (unsigned)(descriptor & 0x3fff) << 4, leading = (unsigned)(descriptor >> 16 & 0x3fff) << 4;
    unsigned stride = (unsigned)(descriptor >> 32 & 0x3fff) << 4, mode = (unsigned)(descriptor >> 62);
    if (descriptor & 0x3fffc000c000c000ull) hopper_trap(line, "a descriptor %#llx with wrong bits", descriptor);
    unsigned width = mode ? 256u >> mode : 16u; // bytes of a row
    if (turn_of(start, mode)) hopper_trap(line, "the matrix at %#llx begins within a swizzle", start);
    for (unsigned piece = 0; piece < count * 2; piece++) {
        unsigned place;
        unsigned n = across ? first + piece / 16 * 8 : first + piece / 2, k = across ? piece % 16 : piece % 2 * 8;
        if (!across) {
            place = n % 8 * width + n / 8 * stride + (mode ? k * 2 : k / 8 * leading);
        } else if (mode) {
            place = n * 2 % width + n * 2 / width * leading + k % 8 * width + k / 8 * stride;
        } else {
            place = n / 8 * stride + k % 8 * 16 + k / 8 * leading;
        }
        Eight eight = eight_of(shared_pointer(swizzled(start + place, mode), 16, line), bf16);
        for (unsigned i = 0; i < 8; i++) {
            to[(n - first + (across ? i : 0)) * to_line + (k + (across ? 0 : i)) * to_place] = eight[i];
        }
    }
}

// A warp's 16 rows of a product, one product after the other in order of k, each rounded once.
static __noinline__ void multiply_rows(const Product &product, unsigned warp) {
    float(&a)[16][16] = hopper().left, *b = hopper().right, *d = hopper().sums;
    unsigned n = product.width * 2;
    read_matrix(a[0], 16, 1, product.a, product.a_across, product.bf16, warp % 4 * 16, 16, product.line);
    read_matrix(b, 1, n, product.b, product.b_across, product.bf16, 0, n, product.line);
    for (unsigned lane = 0; lane < 32; lane++) {
        const float *sums = product.sums[lane];
        float *to = d + lane / 4 * n + lane % 4 * 2;
        for (unsigned j = 0; j < product.width / 4; j++) {
            for (unsigned e = 0; e < 4; e++) to[e / 2 * 8 * n + j * 8 + e % 2] = product.add ? sums[4 * j + e] : 0.0f;
        }
    }
    for (unsigned row = 0; row < 16; row += 4) {
        for (unsigned column = 0; column < n; column += 8) {
            float *to = d + row * n + column;
            Eight sum0 = *(Eight *)to, sum1 = *(Eight *)(to + n), sum2 = *(Eight *)(to + 2 * n),
                  sum3 = *(Eight *)(to + 3 * n);
            for (unsigned k = 0; k < 16; k++) {
                Eight right = *(const Eight *)(b + k * n + column);
                sum0 += a[row][k] * right;
                sum1 += a[row + 1][k] * right;
                sum2 += a[row + 2][k] * right;
                sum3 += a[row + 3][k] * right;
            }
            *(Eight *)to = sum0;
            *(Eight *)(to + n) = sum1;
            *(Eight *)(to + 2 * n) = sum2;
            *(Eight *)(to + 3 * n) = sum3;
        }
    }
    for (unsigned lane = 0; lane < 32; lane++) {
        float *sums = product.sums[lane];
        const float *from = d + lane / 4 * n + lane % 4 * 2;
        for (unsigned j = 0; j < product.width / 4; j++) {
            for (unsigned e = 0; e < 4; e++) sums[4 * j + e] = from[e / 2 * 8 * n + j * 8 + e % 2];
        }
    }
}

// What sums are while a product is under way: not a number that any arithmetic makes.
static constexpr unsigned UNDER_WAY = 0x7fb1e55eu;

static inline bool are_same(const Product &x, const Product &y) {
    return x.a == y.a && x.b == y.b && x.width == y.width && x.a_across == y.a_across && x.b_across == y.b_across &&
           x.bf16 == y.bf16 && x.add == y.add && x.group == y.group;
}

static __noinline__ void begin_product(Product product, float *place) {
    Hopper &h = hopper();
    unsigned line = product.line;
    HopperLane &lane = hopper_use(line);
    unsigned warp = lane_number() / 32;
    product.number = lane.products++;
    product.group = lane.groups;
    if (product.number - h.done[warp] >= Hopper::PRODUCTS) hopper_trap(line, "too many products are under way");
    Product &own = h.products[warp][product.number % Hopper::PRODUCTS];
    Product &first = h.first[warp / 4][product.number % Hopper::PRODUCTS];
    if (h.told[warp] == product.number) {
        if (!first.line || first.number < product.number) first = product;
        own = product;
        h.told[warp]++;
    }
    if (!are_same(own, product)) hopper_trap(line, "the threads of a warp multiply different matrices");
    if (first.number == product.number && !are_same(first, product)) {
        hopper_trap(line, "the warps of a warpgroup multiply different matrices");
    }
    Sums *sums = nullptr;
    for (unsigned i = 0; i < lane.sums_count; i++) {
        Sums *other = lane.sums[i];
        if (other->place == place && other->width == product.width) {
            sums = other;
        } else if (place < other->place + other->width && other->place < place + product.width) {
            hopper_trap(line, "sums overlap with those of another product under way");
        }
    }
    if (!sums) {
        if (!lane.fenced) hopper_trap(line, "there is no wgmma_fence() before the first product");
        if (lane.sums_count == 4) hopper_trap(line, "products with too many different sums are under way");
        Sums *&unused = lane.sums[lane.sums_count++];
        if (!unused) unused = (Sums *)hopper_allocate(sizeof(Sums));
        sums = unused;
        sums->place = place;
        sums->width = product.width;
        memcpy(sums->values, place, product.width * 4);
        for (unsigned i = 0; i < product.width; i++) place[i] = __uint_as_float(UNDER_WAY);
    }
    sums->last = product.number;
    own.sums[lane_number() % 32] = sums->values;
}

static __noinline__ void wait_products(unsigned groups, unsigned line) {
    Hopper &h = hopper();
    HopperLane &lane = hopper_use(line);
    unsigned warp = lane_number() / 32;
    __syncwarp(0xffffffffu, line);
    while (h.done[warp] < lane.products) {
        Product &product = h.products[warp][h.done[warp] % Hopper::PRODUCTS];
        if (product.group + groups >= lane.groups) break;
        for (unsigned i = 0; i < 32; i++) {
            const HopperLane &other = h.lanes[warp * 32 + i];
            if (other.products != lane.products || other.groups != lane.groups) {
                hopper_trap(line, "the threads of a warp disagree about the number of products or groups");
            }
        }
        multiply_rows(product, warp);
        h.done[warp]++;
    }
    // All lanes have come as far: what the first one has done is done for the others, too, though it may be further by
    // now than these wait for.
    unsigned kept = 0;
    for (unsigned i = 0; i < lane.sums_count; i++) {
        Sums *sums = lane.sums[i];
        const Product &last = h.products[warp][sums->last % Hopper::PRODUCTS];
        if (last.group + groups >= lane.groups) {
            Sums *other = lane.sums[kept];
            lane.sums[kept++] = sums;
            lane.sums[i] = other;
            continue;
        }
        for (unsigned j = 0; j < sums->width; j++) {
            if (__float_as_uint(sums->place[j]) != UNDER_WAY) hopper_trap(line, "sums were changed during a product");
        }
        memcpy(sums->place, sums->values, sums->width * 4);
    }
    lane.sums_count = kept;
    lane.fenced = false;
    asm volatile("" ::: "memory");
}

// ---------------------------------------------------------------------------------------------------------------------
// Blocks

static inline void hopper_begin() {
    if (hopper_memory == (Hopper *)1) {
        hopper_memory = (Hopper *)hopper_allocate(sizeof(Hopper));
    }
    Hopper &h = hopper();
    if (h.begun) return;
    h.begun = true;
    const char *seed = getenv("NEARFAR_EMULATED_SEED");
    h.random = (seed ? strtoull(seed, nullptr, 0) : 0) * 0x632be59bd9b4e019ull +
               ((u64)blockIdx.x << 32 | blockIdx.y << 16 | blockIdx.z);
    hopper_random();
}

static inline void hopper_end() {
    Hopper &h = hopper();
    unsigned count = blockDim.x * blockDim.y * blockDim.z;
    HopperLane &lane = hopper_lane();
    h.ended++;
    h.last = lane.rounds;
    if (h.active) {
        if (lane.sums_count) hopper_trap(lane.line, "the thread has ended before its products");
        lane.ended = true;
        h.progress++;
        // What the last one does in a round is seen in the next one here, too.
        do {
            hopper_round();
            if (h.ended < count) hopper_stuck(lane);
        } while (h.ended < count || h.last == lane.rounds);
        if (h.copies_count) {
            const BoxCopy &copy = h.copies[0];
            hopper_trap(copy.line, "the block has ended before a copy for the barrier %#llx", copy.barrier);
        }
    }
    if (++h.gone < count) return;
    // The next block begins anew.
    h.begun = h.active = h.unfenced = false;
    h.ended = h.gone = 0;
    memset(h.named, 0, sizeof(h.named));
    memset(h.done, 0, sizeof(h.done));
    memset(h.told, 0, sizeof(h.told));
    memset(h.first, 0, sizeof(h.first));
    for (unsigned i = 0; i < count; i++) {
        HopperLane &other = h.lanes[i], fresh = {};
        memcpy(fresh.sums, other.sums, sizeof(fresh.sums));
        other = fresh;
    }
}

// More special than the one of device.h, so that every kernel that has arguments is called by this one.
template <typename First, typename... Rest>
static inline void call(void (*kernel)(First, Rest...), void **arguments) {
    hopper_begin();
    call(kernel, arguments, Indices<__integer_pack(1 + sizeof...(Rest))...>());
    hopper_end();
}

} // namespace emulation

// ---------------------------------------------------------------------------------------------------------------------
// What kernels call

static inline u32 shared_place(const void *pointer) {
    using namespace emulation;
    const char *p = (const char *)pointer, *dynamic = (const char *)thread->block->dynamic;
    if (p >= __bss_start && p < _end) return shared_begin() + (u32)(p - __bss_start);
    return dynamic_begin() + (u32)(p - dynamic);
}

static inline void mbarrier_init(u32 barrier, u32 arrivals, EMULATION_LINE) {
    using namespace emulation;
    hopper_use(line);
    if (barrier % 8) hopper_trap(line, "the barrier %#llx is misaligned", barrier);
    if (!arrivals || arrivals > 4095) hopper_trap(line, "a barrier cannot wait for %llu arrivals", arrivals);
    Phases *phases = (Phases *)shared_pointer(barrier, 8, line);
    memset(phases, 0, 8);
    phases->expected = phases->pending = arrivals;
    phases->changed = 0x1fff;
    phases->magic = 5;
    hopper().unfenced = true;
}

static inline void mbarrier_init_fence(EMULATION_LINE) {
    emulation::hopper_use(line);
    emulation::hopper().unfenced = false;
}

static inline void mbarrier_arrive(u32 barrier, EMULATION_LINE) {
    emulation::hopper_use(line);
    emulation::arrive(barrier, 0, line);
}

static inline void mbarrier_arrive_expect(u32 barrier, u32 bytes, EMULATION_LINE) {
    emulation::hopper_use(line);
    emulation::arrive(barrier, bytes, line);
}

static inline bool mbarrier_try_wait(u32 barrier, u32 parity, EMULATION_LINE) {
    using namespace emulation;
    HopperLane &lane = hopper_use(line);
    Phases *phases = phases_at(barrier, line);
    if (parity > 1) hopper_trap(line, "%llu is no parity", parity);
    if (hopper().unfenced) hopper_trap(line, "barriers were begun without mbarrier_init_fence()");
    if (!is_over(phases, parity, lane.rounds)) {
        lane.what = "the barrier at";
        lane.where = barrier;
        lane.parity = parity;
        finish_copies(barrier, hopper_stuck(lane));
        hopper_round();
        if (!is_over(phases, parity, lane.rounds)) return false;
    }
    hopper_passed(lane);
    asm volatile("" ::: "memory");
    return true;
}

static inline void fence_async(EMULATION_LINE) { emulation::hopper_use(line); }

static inline void named_barrier(u32 number, u32 threads, EMULATION_LINE) {
    using namespace emulation;
    HopperLane &lane = hopper_use(line);
    if (number < 1 || number > 15) hopper_trap(line, "there is no barrier number %llu", number);
    if (!threads || threads % 32) hopper_trap(line, "%llu threads are no whole warps", threads);
    NamedBarrier &barrier = hopper().named[number];
    if (!barrier.arrived) barrier.expected = threads;
    if (barrier.expected != threads) {
        hopper_trap(line, "threads that wait at the barrier number %llu disagree: of %llu or %llu", number, threads,
                    barrier.expected);
    }
    hopper().progress++;
    unsigned generation = barrier.generation;
    if (++barrier.arrived == threads) {
        barrier.arrived = 0;
        barrier.generation++;
        barrier.changed = lane.rounds;
    }
    lane.what = "the barrier number";
    lane.where = number;
    lane.parity = threads;
    while (barrier.generation == generation ||
           (barrier.generation == generation + 1 && barrier.changed == lane.rounds)) {
        hopper_stuck(lane);
        hopper_round();
    }
    hopper_passed(lane);
    asm volatile("" ::: "memory");
}

static inline void prefetch_map(const CUtensorMap &map, EMULATION_LINE) { emulation::check_map(map, line); }

static inline void copy_box(u32 to, const CUtensorMap &map, i32 column, i32 row, u32 barrier, EMULATION_LINE) {
    using namespace emulation;
    hopper_use(line);
    check_map(map, line);
    Hopper &h = hopper();
    if (h.copies_count == Hopper::COPIES) hopper_trap(line, "too many copies are under way");
    BoxCopy &copy = h.copies[h.copies_count++];
    copy.map = *(const TensorMap *)&map;
    copy.column = column;
    copy.row = row;
    copy.to = to;
    copy.barrier = barrier;
    copy.line = line;
    copy.written = false;
    if (copy.map.rank != 2 || copy.map.interleave) hopper_trap(line, "a box is not of a matrix");
    if (to % 128) hopper_trap(line, "a box is copied to %#llx, which is misaligned", to);
    shared_pointer(to, box_bytes(copy), line);
    phases_at(barrier, line);
    if (h.unfenced) hopper_trap(line, "barriers were begun without mbarrier_init_fence()");
    u64 chance = hopper_random() >> 20 & 3;
    if (chance < 2) {
        write_box(copy);
        copy.written = true;
    }
    if (chance == 0) {
        h.copies_count--;
        finish_copy(copy);
    }
}

static inline void
copy_box_to_blocks(u32 to, const CUtensorMap &map, i32 column, i32 row, u32 barrier, u16 blocks, EMULATION_LINE) {
    if (blocks != 1) emulation::hopper_trap(line, "clusters have one block here");
    copy_box(to, map, column, row, barrier, line);
}

static inline u32 block_of_cluster() { return 0; }

static inline void sync_cluster(EMULATION_LINE) { __syncthreads(line); }

static inline void mbarrier_arrive_at(u32 barrier, u32 block, EMULATION_LINE) {
    if (block) emulation::hopper_trap(line, "clusters have one block here");
    mbarrier_arrive(barrier, line);
}

template <int REGISTERS> static inline void lower_registers(EMULATION_LINE) {
    static_assert(REGISTERS % 8 == 0 && REGISTERS >= 24 && REGISTERS <= 256, "a multiple of 8 from 24 on");
    emulation::hopper_use(line);
}

template <int REGISTERS> static inline void raise_registers(EMULATION_LINE) { lower_registers<REGISTERS>(line); }

static inline void wgmma_fence(EMULATION_LINE) { emulation::hopper_use(line).fenced = true; }

static inline void wgmma_commit(EMULATION_LINE) { emulation::hopper_use(line).groups++; }

template <int N> static inline void wgmma_wait(EMULATION_LINE) { emulation::wait_products(N, line); }

template <int N> static inline void hold(float (&)[N]) {}

#define EMULATION_WGMMA(name, width, bf16)                                                                             \
    template <bool ADD, bool A_ACROSS, bool B_ACROSS>                                                                  \
    static inline void name(float (&d)[width], u64 a, u64 b, EMULATION_LINE) {                                         \
        emulation::begin_product({a, b, 0, 0, width, line, A_ACROSS, B_ACROSS, bf16, ADD, {}}, d);                     \
    }
EMULATION_WGMMA(wgmma_f16, 64, false)
EMULATION_WGMMA(wgmma_bf16, 64, true)
EMULATION_WGMMA(wgmma_f16, 128, false)
EMULATION_WGMMA(wgmma_bf16, 128, true)

#endif
