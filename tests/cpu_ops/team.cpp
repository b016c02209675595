// What Team promises (plugins/cpu/team.h), with a stand-in for ONNX Runtime's threads: two of them, or one after the other.
//
//     team THREADS          exit status 0, or 1 and what was wrong
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "team.h"

using cm::cpu::Team;

static int threads = 1;

static ort::Status* parallel_for(const ort::Context*, void (*function)(void*, size_t), size_t total, size_t, void* data) {
    std::vector<std::thread> all;
    for (size_t i = 0; i < total; ++i) {
        if (threads == 1) {
            function(data, i);
        } else {
            all.emplace_back(function, data, i);
        }
    }
    for (std::thread& one : all) one.join();
    return nullptr;
}

static void need(bool holds, const char* what) {
    if (holds) return;
    std::puts(what);
    std::exit(1);
}

static void rest() { std::this_thread::sleep_for(std::chrono::milliseconds(2)); }

// Each unit of each phase once, and none before all of the phase before it; `made` is written by one thread and read by another.
static void phases() {
    constexpr size_t kUnits = 7;
    int made[3][kUnits] = {}, list = 0;
    const auto all_of = [&](int phase) {
        int sum = 0;
        for (int one : made[phase]) sum += one;
        return sum;
    };
    Team::run(nullptr, kUnits, [&](Team& team) {
        team.each(kUnits, [&](size_t i) { rest(), ++made[0][i]; });
        team.each(kUnits, [&](size_t i) { need(all_of(0) == kUnits, "a phase began too early"), rest(), ++made[1][i]; });
        team.once([&] { need(all_of(1) == kUnits, "`once` came before the units in front of it"), rest(), ++list; });
        team.each(kUnits, [&](size_t i) { need(list == 1, "a phase began before `once` was done"), ++made[2][i]; });
    });
    for (const auto& phase : made)
        for (int one : phase) need(one == 1, "a unit was not done once");
}

// An error of one thread is the caller's, and nobody waits for what will not be done.
static void failure() {
    std::string found;
    try {
        Team::run(nullptr, 4, [&](Team& team) {
            team.each(4, [&](size_t i) {
                if (i == 3) throw std::runtime_error("no memory");
                rest();
            });
            team.each(4, [&](size_t) { need(false, "a phase began although one before it has failed"); });
        });
    } catch (const std::runtime_error& error) {
        found = error.what();
    }
    need(found == "no memory", "the error was lost");
}

// Shares are neighbours, and cover all units.
static void shares() {
    Team::run(nullptr, 2, [&](Team& team) {
        size_t begin = 0;
        while (begin < 5) {
            const size_t last = team.last_of_home(begin, 5);
            for (size_t i = begin; i <= last; ++i) need(team.last_of_home(i, 5) == last, "neighbours are in two shares");
            begin = last + 1;
        }
        need(begin == 5, "a share ends behind the last unit");
    });
}

int main(int, char** words) {
#if defined(__linux__)
    cpu_set_t every;  // whoever started this may have been given one processor, and a team has no more members than there are
    std::memset(&every, 0xff, sizeof every);
    sched_setaffinity(0, sizeof every, &every);
#endif
    threads = std::atoi(words[1]);
    static void* table[300] = {};
    table[274] = reinterpret_cast<void*>(parallel_for);
    ort::Api::table = table;
    phases(), failure(), shares();
}
