// The threads of a session at work on one op, whose phases need each what the one before has made. ONNX Runtime is asked for its
// threads once: to wake them for each phase takes some microseconds, and a phase of a small product takes twenty.
#pragma once

#include <atomic>
#include <exception>

#include "op.h"

namespace cm::cpu {

class Team {
public:
    // Calls member(team) on the session's threads, `most` of them at most; all that a member does is `each` and `once`. A thread may
    // come when others are done: it finds nothing left to do.
    template <class Function>
    static void run(const ort::Context* context, size_t most, Function&& member) {
        Shared shared;
        const size_t members = std::min(most, static_cast<size_t>(processors()));
        shared.homes = std::max<size_t>(1, std::min(members, kHomes));
        auto join = [&](size_t i) {
            Team team(shared, i % shared.homes);
            try {
                member(team);
            } catch (const Stopped&) {
            } catch (...) {
                if (!shared.failed.exchange(true)) shared.failure = std::current_exception();
            }
        };
        in_parallel(context, members, join);
        if (shared.failed) std::rethrow_exception(shared.failure);
    }

    // Calls function(0 .. count - 1), and is back when all of them are done. Each thread begins with its own share ("home"), from one
    // end to the other, as memory is read fastest, and then takes what others have left. `count` is the same on every thread.
    template <class Function>
    void each(size_t count, Function&& function) {
        Phase& phase = shared_.phases[phase_++];
        for (size_t turn = 0; turn < shared_.homes; ++turn) {
            const size_t home = (home_ + turn) % shared_.homes, begin = first_of(home, count), end = first_of(home + 1, count);
            for (size_t i; (i = begin + phase.begun[home].fetch_add(1, std::memory_order_relaxed)) < end;) {
                function(i);
                phase.done.fetch_add(1, std::memory_order_release);
            }
        }
        for (int turns = 0; phase.done.load(std::memory_order_acquire) < count; ++turns) {
            if (shared_.failed) throw Stopped{};
            turns < kTurns ? pause() : std::this_thread::yield();
        }
    }

    // The last one of the share that i lies in.
    size_t last_of_home(size_t i, size_t count) const {
        size_t home = 0;
        while (first_of(home + 1, count) <= i) ++home;
        return first_of(home + 1, count) - 1;
    }

    template <class Function>
    void once(Function&& function) {
        each(1, [&](size_t) { function(); });
    }

private:
    static constexpr int kPhases = 8, kTurns = 20000;  // of waiting, before others may have this processor
    struct Stopped {};  // another thread has failed
    static constexpr size_t kHomes = 8;
    struct alignas(64) Phase {
        std::atomic<size_t> done{0}, begun[kHomes] = {};
    };
    struct Shared {
        size_t homes = 1;
        Phase phases[kPhases];
        std::atomic<bool> failed{false};
        std::exception_ptr failure;
    };

    Team(Shared& shared, size_t home) : shared_(shared), home_(home) {}

    size_t first_of(size_t home, size_t count) const { return count * home / shared_.homes; }

    static void pause() {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#elif defined(__aarch64__)
        asm volatile("yield");
#endif
    }

    Shared& shared_;
    size_t home_;
    int phase_ = 0;
};

}  // namespace cm::cpu
