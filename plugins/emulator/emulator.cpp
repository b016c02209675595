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

using Work = std::function<cudaError_t()>;

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

// What belongs to the kernel that runs. A kernel that waits for the one before it has that one run in its middle.
struct Running {
    std::vector<std::unique_ptr<Fiber>> fibers;
    std::vector<Warp> warps;
    Barrier whole_block;
    const std::function<void()>* body = nullptr;
    unsigned char* shared = nullptr;
    Work before;  // launched before this one and not run yet
    jmp_buf scheduler;
    void* scheduler_kept = nullptr;
    const void* scheduler_stack = nullptr;
    size_t scheduler_stack_size = 0;
    bool failed = false;
};

std::unique_ptr<Running> running;
thread_local Work last_launched;  // not run yet: whether another kernel starts early is not known
bool reverse = false;
std::mutex one_kernel;

Fiber& self() { return *running->fibers[thread_index.x]; }

void yield() {
    Fiber& me = self();
    if (_setjmp(me.place) == 0) {
        CM_LEAVE(&me.kept, running->scheduler_stack, running->scheduler_stack_size);
        _longjmp(running->scheduler, 1);
    }
    CM_ARRIVE(self().kept, &running->scheduler_stack, &running->scheduler_stack_size);
}

void leave(Barrier& barrier) {
    barrier.left = true;
    if (barrier.arrived > 0) fail("a thread returned while others wait for it at a barrier");
}

void fiber_main() {
    CM_ARRIVE(nullptr, &running->scheduler_stack, &running->scheduler_stack_size);
    for (;;) {
        (*running->body)();
        leave(running->whole_block);
        leave(running->warps[thread_index.x / kLanes].barrier);
        self().done = true;
        yield();
    }
}

void resume(Fiber& fiber) {
    if (_setjmp(running->scheduler) == 0) {
        CM_LEAVE(&running->scheduler_kept, fiber.stack.get(), kStack);
        if (fiber.started) _longjmp(fiber.place, 1);
        fiber.started = true;
        setcontext(&fiber.start);
    }
    CM_ARRIVE(running->scheduler_kept, nullptr, nullptr);
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
    for (int i = 0; i < kLanes && !running->failed; ++i) {
        const int which = warp * kLanes + (reverse ? kLanes - 1 - i : i);
        Fiber& fiber = *running->fibers[which];
        if (fiber.done || (fiber.waits != nullptr && fiber.waits->opened == fiber.since)) continue;
        moved = true;
        thread_index.x = which;
        resume(fiber);
    }
    return moved;
}

void run_block(int threads) {
    running->whole_block = Barrier{threads};
    running->warps.assign(threads / kLanes, Warp{});
    for (Warp& warp : running->warps) warp.barrier.members = kLanes;
    for (int i = 0; i < threads; ++i) {
        running->fibers[i]->done = false;
        running->fibers[i]->waits = nullptr;
    }
    for (bool going = true; going && !running->failed;) {
        going = false;
        bool moved = false;
        for (int i = 0; i < threads / kLanes && !running->failed; ++i) {
            const int warp = reverse ? threads / kLanes - 1 - i : i;
            // As far as it gets without the others: what only happens to be ready in time is then missing.
            while (!running->failed && run_warp(warp)) moved = true;
            for (int lane = 0; lane < kLanes; ++lane) going = going || !running->fibers[warp * kLanes + lane]->done;
        }
        if (going && !moved && !running->failed) {
            fprintf(stderr, "cm_export emulator: block %u: its threads wait for each other\n", block_index.x);
            running->failed = true;
        }
    }
}

}  // namespace

void fail(const char* what) {
    fprintf(stderr, "cm_export emulator: block %u, thread %u: %s\n", block_index.x, thread_index.x, what);
    running->failed = true;
    for (;;) yield();  // never resumed
}

unsigned char* shared_memory() { return running->shared; }

void wait_for_block() { arrive(running->whole_block); }

int lane() { return thread_index.x % kLanes; }

uint32_t exchange(uint32_t mine, int source) {
    Warp& warp = running->warps[thread_index.x / kLanes];
    const int me = lane();
    uint32_t* slots = warp.slots[warp.turn[me]++ % 2];
    slots[me] = mine;
    arrive(warp.barrier);
    return slots[source];
}

namespace {

cudaError_t run(int64_t grid, int block, size_t shared_bytes, const std::function<void()>& thread, Work before) {
    if (grid < 1 || grid > INT32_MAX || block < 1 || block > 1024 || shared_bytes > 48 * 1024) {
        return cudaErrorInvalidConfiguration;
    }
    if (block % kLanes != 0) return cudaErrorInvalidConfiguration;  // CUDA allows it; shuffles of whole warps do not
    void* memory = nullptr;
    if (posix_memalign(&memory, 16, shared_bytes > 0 ? shared_bytes : 1) != 0) return cudaErrorMemoryAllocation;
    std::unique_ptr<Running> outer = std::move(running);
    const Index outer_thread = thread_index, outer_block = block_index, outer_size = block_size, outer_grid = grid_size;
    running = std::make_unique<Running>();
    for (int i = 0; i < block; ++i) {
        running->fibers.push_back(std::make_unique<Fiber>());
        prepare(*running->fibers.back());
    }
    running->shared = static_cast<unsigned char*>(memory);
    running->body = &thread;
    const bool early = static_cast<bool>(before);
    running->before = std::move(before);
    block_size.x = block;
    grid_size.x = static_cast<unsigned>(grid);
    for (int64_t i = 0; i < grid && !running->failed; ++i) {
        block_index.x = static_cast<unsigned>(reverse ? grid - 1 - i : i);
        memset(memory, 0xff, shared_bytes);
        run_block(block);
    }
    bool wrong = running->failed;
    if (early && running->before && !wrong) {
        fprintf(stderr, "cm_export emulator: a kernel that was launched early does not wait for the one before it\n");
        wrong = true;
    }
    free(memory);
    running = std::move(outer);
    thread_index = outer_thread;
    block_index = outer_block;
    block_size = outer_size;
    grid_size = outer_grid;
    return wrong ? cudaErrorLaunchFailure : cudaSuccess;
}

}  // namespace

void launch(int64_t grid, int block, size_t shared_bytes, std::function<void()> thread, bool early) {
    Work before = std::move(last_launched);
    last_launched = [=, before = std::move(before)]() -> cudaError_t {
        if (early || !before) return run(grid, block, shared_bytes, thread, before);
        const cudaError_t error = before();
        return error != cudaSuccess ? error : run(grid, block, shared_bytes, thread, nullptr);
    };
}

void wait_for_previous() {
    if (!running->before) return;
    const Work before = std::move(running->before);
    running->before = nullptr;
    if (before() != cudaSuccess) fail("the kernel before this one failed");
}

cudaError_t finish() {
    const std::lock_guard<std::mutex> only(one_kernel);
    const Work last = std::move(last_launched);
    last_launched = nullptr;
    return last ? last() : cudaSuccess;
}

}  // namespace cm::emulator

extern "C" __attribute__((visibility("default"))) void cm_emulator_reverse(int on) { cm::emulator::reverse = on != 0; }
