// One rank's end of a communicator: shared memory between the processes of one host.
#pragma once

#include <pthread.h>

#include <atomic>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "streams.h"
#include "third_party/hccl/inc/hccl/hccl_types.h"

namespace npusim {

constexpr uint32_t kMaxRanks = 64;
constexpr uint64_t kSlotBytes = 1 << 20;  // of each rank, for collectives
constexpr uint64_t kRingBytes = 1 << 20;  // of each ordered pair of ranks, for point to point

// What a rank says about the collective it enters; all must say the same.
struct Announcement {
    char op[24];
    uint64_t sequence;
    uint64_t count;       // elements; not compared where ranks may differ
    bool counts_differ;
    int32_t dtype;
    int32_t reduction;
    int32_t root;
    uint64_t sends[kMaxRanks];  // AlltoAll: elements for each rank

    bool agrees_with(const Announcement &other) const;
    std::string text() const;
};

// A byte stream from one rank to another. Only the writer moves `written`, only the reader `read`.
struct Ring {
    std::atomic<uint64_t> written;
    std::atomic<uint64_t> read;
    char bytes[kRingBytes];

    void put(const void *source, uint64_t size);
    void get(void *target, uint64_t size);
    uint64_t filled() const { return written - read; }
    uint64_t room() const { return kRingBytes - filled(); }
};

// At the start of the shared memory; the slots and the rings follow.
struct Shared {
    std::atomic<bool> ready;
    std::atomic<uint32_t> attached;
    std::atomic<int> error;
    pthread_mutex_t mutex;
    pthread_cond_t changed;
    uint32_t num_arrived;
    uint64_t generation;  // of the barrier
    pid_t processes[kMaxRanks];
    // Of this and of the last collective: a rank may be one ahead of another that still reads.
    Announcement announcements[2][kMaxRanks];
};

class Communicator {
public:
    // Waits until every rank has joined; null when one does not come in time.
    static Communicator *join(const std::string &id, const std::string &name, uint32_t size,
                              uint32_t rank);

    const std::string name;
    const uint32_t size;
    const uint32_t rank;

    int error() const { return error_; }

    // Reports the fault on stderr, and makes this and every other rank's calls fail.
    int fail(HcclResult code, const std::string &what);

    // 0 when all ranks have come.
    int barrier();

    // Compares what the ranks are about to do; a difference is an error on every rank.
    int agree(Announcement mine);
    const Announcement &announced(uint32_t of_rank) const;

    char *slot(uint32_t of_rank);
    Ring &ring(uint32_t from, uint32_t to);

    // Wakes everybody who waits on this communicator.
    void notify();

    // Waits until `done`, asked again after each notify; fails on a time-out, or when one of the
    // ranks that are awaited is dead.
    int wait(const std::function<bool()> &done, const std::vector<uint32_t> &awaited,
             const std::string &what);

private:
    Communicator(std::string name, uint32_t size, uint32_t rank, char *memory);
    std::string dead_among(const std::vector<uint32_t> &ranks) const;
    void sleep_until_notified();
    void lock();
    void unlock();

    std::vector<uint32_t> everybody_;
    char *memory_;
    Shared *shared_;
    uint64_t sequence_ = 0;
    int error_ = 0;
};

uint64_t size_of(HcclDataType dtype);

// dst[i] = the reduction of sources[r][i] over the ranks r, in their order: fp16 and bf16 in fp32,
// rounded once; everything else in its own type. False where HCCL has no such reduction.
bool reduce(void *target, const std::vector<const void *> &sources, uint64_t count,
            HcclDataType dtype, HcclReduceOp op);

}  // namespace npusim
