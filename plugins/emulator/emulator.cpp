#include "emulator.h"

#include <csetjmp>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

#include <ucontext.h>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#define CM_LEAVE(keep, bottom, size) __sanitizer_start_switch_fiber(keep, bottom, size)
#define CM_ARRIVE(kept, bottom, size) __sanitizer_finish_switch_fiber(kept, bottom, size)
#else
#define CM_LEAVE(keep, bottom, size) (void)0
#define CM_ARRIVE(kept, bottom, size) (void)0
#endif

namespace cm::emulator {

Index thread_index, block_index, block_size, grid_size;

namespace {

constexpr size_t kStack = 64 * 1024;
constexpr int kLanes = 32;

// Threads that wait for one another: open when all have arrived, counted by `opened`.
struct Barrier {
    int members = 0;
    int arrived = 0;
    unsigned opened = 0;
    bool left = false;  // a member has returned
};

// One thread of a block. It is started once and then runs one block after the other.
struct Fiber {
    std::unique_ptr<char[]> stack{new char[kStack]};
    ucontext_t start;
    jmp_buf place;
    void* kept = nullptr;  // what AddressSanitizer keeps for it while it is away
    bool started = false;
    bool done = false;
    const Barrier* waits = nullptr;
    unsigned since = 0;
};

struct Warp {
    Barrier barrier;
    uint32_t slots[2][kLanes];  // two sets: a fast lane may give its next number before a slow one has read the last
    unsigned turn[kLanes] = {};
};

std::vector<std::unique_ptr<Fiber>> fibers;
std::vector<Warp> warps;
Barrier whole_block;
const std::function<void()>* body = nullptr;
unsigned char* shared = nullptr;
jmp_buf scheduler;
void* scheduler_kept = nullptr;
const void* scheduler_stack = nullptr;
size_t scheduler_stack_size = 0;
bool failed = false;
bool reverse = false;
std::mutex one_kernel;

Fiber& self() { return *fibers[thread_index.x]; }

void yield() {
    Fiber& me = self();
    if (_setjmp(me.place) == 0) {
        CM_LEAVE(&me.kept, scheduler_stack, scheduler_stack_size);
        _longjmp(scheduler, 1);
    }
    CM_ARRIVE(self().kept, &scheduler_stack, &scheduler_stack_size);
}

void leave(Barrier& barrier) {
    barrier.left = true;
    if (barrier.arrived > 0) fail("a thread returned while others wait for it at a barrier");
}

void fiber_main() {
    CM_ARRIVE(nullptr, &scheduler_stack, &scheduler_stack_size);
    for (;;) {
        (*body)();
        leave(whole_block);
        leave(warps[thread_index.x / kLanes].barrier);
        self().done = true;
        yield();
    }
}

void resume(Fiber& fiber) {
    if (_setjmp(scheduler) == 0) {
        CM_LEAVE(&scheduler_kept, fiber.stack.get(), kStack);
        if (fiber.started) _longjmp(fiber.place, 1);
        fiber.started = true;
        setcontext(&fiber.start);
    }
    CM_ARRIVE(scheduler_kept, nullptr, nullptr);
}

void prepare(Fiber& fiber) {
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.get();
    fiber.start.uc_stack.ss_size = kStack;
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, fiber_main, 0);
    fiber.started = false;
}

void arrive(Barrier& barrier) {
    if (barrier.left) fail("a barrier that a thread has already left by returning");
    const unsigned since = barrier.opened;
    if (++barrier.arrived == barrier.members) {
        barrier.arrived = 0;
        ++barrier.opened;
        return;
    }
    self().waits = &barrier;
    self().since = since;
    while (barrier.opened == since) yield();
    self().waits = nullptr;
}

// Resumes each lane that need not wait; whether there was one.
bool run_warp(int warp) {
    bool moved = false;
    for (int i = 0; i < kLanes && !failed; ++i) {
        const int which = warp * kLanes + (reverse ? kLanes - 1 - i : i);
        Fiber& fiber = *fibers[which];
        if (fiber.done || (fiber.waits != nullptr && fiber.waits->opened == fiber.since)) continue;
        moved = true;
        thread_index.x = which;
        resume(fiber);
    }
    return moved;
}

void run_block(int threads) {
    whole_block = Barrier{threads};
    warps.assign(threads / kLanes, Warp{});
    for (Warp& warp : warps) warp.barrier.members = kLanes;
    for (int i = 0; i < threads; ++i) {
        fibers[i]->done = false;
        fibers[i]->waits = nullptr;
    }
    for (bool running = true; running && !failed;) {
        running = false;
        bool moved = false;
        for (int i = 0; i < threads / kLanes && !failed; ++i) {
            const int warp = reverse ? threads / kLanes - 1 - i : i;
            // As far as it gets without the others: what only happens to be ready in time is then missing.
            while (!failed && run_warp(warp)) moved = true;
            for (int lane = 0; lane < kLanes; ++lane) running = running || !fibers[warp * kLanes + lane]->done;
        }
        if (running && !moved && !failed) {
            fprintf(stderr, "cm_export emulator: block %u: its threads wait for each other\n", block_index.x);
            failed = true;
        }
    }
}

}  // namespace

void fail(const char* what) {
    fprintf(stderr, "cm_export emulator: block %u, thread %u: %s\n", block_index.x, thread_index.x, what);
    failed = true;
    for (;;) yield();  // never resumed: run() starts all fibers anew after a failure
}

unsigned char* shared_memory() { return shared; }

void wait_for_block() { arrive(whole_block); }

int lane() { return thread_index.x % kLanes; }

uint32_t exchange(uint32_t mine, int source) {
    Warp& warp = warps[thread_index.x / kLanes];
    const int me = lane();
    uint32_t* slots = warp.slots[warp.turn[me]++ % 2];
    slots[me] = mine;
    arrive(warp.barrier);
    return slots[source];
}

cudaError_t run(int64_t grid, int block, size_t shared_bytes, const std::function<void()>& thread) {
    const std::lock_guard<std::mutex> only(one_kernel);
    if (grid < 1 || grid > INT32_MAX || block < 1 || block > 1024 || shared_bytes > 48 * 1024) {
        return cudaErrorInvalidConfiguration;
    }
    if (block % kLanes != 0) return cudaErrorInvalidConfiguration;  // CUDA allows it; shuffles of whole warps do not
    while (fibers.size() < static_cast<size_t>(block)) {
        fibers.push_back(std::make_unique<Fiber>());
        prepare(*fibers.back());
    }
    void* memory = nullptr;
    if (posix_memalign(&memory, 16, shared_bytes > 0 ? shared_bytes : 1) != 0) return cudaErrorMemoryAllocation;
    shared = static_cast<unsigned char*>(memory);
    body = &thread;
    block_size.x = block;
    grid_size.x = static_cast<unsigned>(grid);
    failed = false;
    for (int64_t i = 0; i < grid && !failed; ++i) {
        block_index.x = static_cast<unsigned>(reverse ? grid - 1 - i : i);
        memset(memory, 0xff, shared_bytes);
        run_block(block);
    }
    if (failed) {
        for (auto& fiber : fibers) prepare(*fiber);
    }
    free(memory);
    return failed ? cudaErrorLaunchFailure : cudaSuccess;
}

}  // namespace cm::emulator

extern "C" __attribute__((visibility("default"))) void cm_emulator_reverse(int on) { cm::emulator::reverse = on != 0; }
