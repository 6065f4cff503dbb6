#include "hccl_communicator.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <thread>

namespace npusim {
namespace {

using Clock = std::chrono::steady_clock;

Clock::time_point deadline()
{
    const char *seconds = std::getenv("HCCL_SIM_TIMEOUT");
    return Clock::now() + std::chrono::milliseconds(seconds ? 1000 * std::atol(seconds) : 60000);
}

uint64_t page_aligned(uint64_t size) { return (size + 4095) & ~uint64_t{4095}; }

uint64_t memory_size(uint64_t size)
{
    return page_aligned(sizeof(Shared)) + size * kSlotBytes + size * size * sizeof(Ring);
}

void initialize(Shared &shared)
{
    pthread_mutexattr_t mutex;
    pthread_mutexattr_init(&mutex);
    pthread_mutexattr_setpshared(&mutex, PTHREAD_PROCESS_SHARED);
    pthread_mutexattr_setrobust(&mutex, PTHREAD_MUTEX_ROBUST);  // a rank may die holding it
    pthread_mutex_init(&shared.mutex, &mutex);
    pthread_condattr_t condition;
    pthread_condattr_init(&condition);
    pthread_condattr_setpshared(&condition, PTHREAD_PROCESS_SHARED);
    pthread_cond_init(&shared.changed, &condition);
    shared.ready = true;
}

// The first rank to come creates the memory; the others wait until it has its full size.
char *map_memory(const std::string &id, uint64_t bytes, bool &created)
{
    int file = shm_open(id.c_str(), O_RDWR | O_CREAT | O_EXCL, 0600);
    created = file >= 0;
    if (created) {
        if (ftruncate(file, static_cast<off_t>(bytes))) return nullptr;
    } else {
        file = shm_open(id.c_str(), O_RDWR, 0600);
        if (file < 0) return nullptr;
        auto end = deadline();
        while (lseek(file, 0, SEEK_END) < static_cast<off_t>(bytes)) {
            if (Clock::now() > end) return nullptr;
            std::this_thread::sleep_for(std::chrono::milliseconds(1));
        }
    }
    void *memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    return memory == MAP_FAILED ? nullptr : static_cast<char *>(memory);
}

}  // namespace

// ---- what ranks tell each other

bool Announcement::agrees_with(const Announcement &other) const
{
    return std::strcmp(op, other.op) == 0 && sequence == other.sequence && dtype == other.dtype &&
           reduction == other.reduction && root == other.root &&
           (counts_differ || count == other.count);
}

std::string Announcement::text() const
{
    return std::string(op) + "(count=" + std::to_string(count) + " dtype=" +
           std::to_string(dtype) + " reduction=" + std::to_string(reduction) + " root=" +
           std::to_string(root) + " sequence=" + std::to_string(sequence) + ")";
}

void Ring::put(const void *source, uint64_t size)
{
    uint64_t at = written % kRingBytes;
    uint64_t first = std::min(size, kRingBytes - at);
    std::memcpy(bytes + at, source, first);
    std::memcpy(bytes, static_cast<const char *>(source) + first, size - first);
    written += size;
}

void Ring::get(void *target, uint64_t size)
{
    uint64_t at = read % kRingBytes;
    uint64_t first = std::min(size, kRingBytes - at);
    std::memcpy(target, bytes + at, first);
    std::memcpy(static_cast<char *>(target) + first, bytes, size - first);
    read += size;
}

// ---- joining

Communicator::Communicator(std::string name, uint32_t size, uint32_t rank, char *memory)
    : name(std::move(name)),
      size(size),
      rank(rank),
      everybody_(size),
      memory_(memory),
      shared_(reinterpret_cast<Shared *>(memory))
{
    std::iota(everybody_.begin(), everybody_.end(), 0);
}

Communicator *Communicator::join(const std::string &id, const std::string &name, uint32_t size,
                                 uint32_t rank)
{
    bool created;
    char *memory = map_memory(id, memory_size(size), created);
    if (!memory) return nullptr;
    auto *shared = reinterpret_cast<Shared *>(memory);
    if (created) initialize(*shared);
    auto end = deadline();
    auto wait_until = [end](auto condition) {
        while (!condition()) {
            if (Clock::now() > end) return false;
            std::this_thread::sleep_for(std::chrono::microseconds(500));
        }
        return true;
    };
    bool joined = wait_until([&] { return shared->ready.load(); });
    shared->processes[rank] = getpid();
    shared->attached++;
    joined = joined && wait_until([&] { return shared->attached >= size; });
    // Everybody has mapped it: the name is not needed, and must not outlive a killed process.
    if (created) shm_unlink(id.c_str());
    if (joined) return new Communicator(name, size, rank, memory);
    std::fprintf(stderr, "[hccl_sim] communicator %s: %u of %u ranks joined in time\n",
                 name.c_str(), shared->attached.load(), size);
    return nullptr;
}

// ---- memory

char *Communicator::slot(uint32_t of_rank)
{
    return memory_ + page_aligned(sizeof(Shared)) + of_rank * kSlotBytes;
}

Ring &Communicator::ring(uint32_t from, uint32_t to)
{
    auto *rings = reinterpret_cast<Ring *>(slot(size));
    return rings[from * size + to];
}

const Announcement &Communicator::announced(uint32_t of_rank) const
{
    return shared_->announcements[sequence_ % 2][of_rank];
}

// ---- waiting and failing

void Communicator::lock()
{
    if (pthread_mutex_lock(&shared_->mutex) == EOWNERDEAD) {
        pthread_mutex_consistent(&shared_->mutex);
    }
}

void Communicator::unlock() { pthread_mutex_unlock(&shared_->mutex); }

void Communicator::notify()
{
    lock();
    pthread_cond_broadcast(&shared_->changed);
    unlock();
}

// At most a tenth of a second: a rank that dies notifies nobody.
void Communicator::sleep_until_notified()
{
    timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_nsec += 100'000'000;
    until.tv_sec += until.tv_nsec / 1'000'000'000;
    until.tv_nsec %= 1'000'000'000;
    if (pthread_cond_timedwait(&shared_->changed, &shared_->mutex, &until) == EOWNERDEAD) {
        pthread_mutex_consistent(&shared_->mutex);
    }
}

std::string Communicator::dead_among(const std::vector<uint32_t> &ranks) const
{
    for (uint32_t other : ranks) {
        if (kill(shared_->processes[other], 0) && errno == ESRCH) {
            return "rank " + std::to_string(other) + " is dead";
        }
    }
    return "";
}

int Communicator::wait(const std::function<bool()> &done, const std::vector<uint32_t> &awaited,
                       const std::string &what)
{
    auto end = deadline();
    std::string fault;
    lock();
    while (!done() && fault.empty()) {
        if (shared_->error) {
            fault = "another rank failed";
        } else if (Clock::now() > end) {
            fault = "time-out";
        } else {
            fault = dead_among(awaited);
        }
        if (fault.empty()) sleep_until_notified();
    }
    unlock();
    return fault.empty() ? 0 : fail(HCCL_E_TIMEOUT, fault + " in " + what);
}

int Communicator::fail(HcclResult code, const std::string &what)
{
    std::fprintf(stderr, "[hccl_sim] communicator %s rank %u of %u, call %lu: %s\n", name.c_str(),
                 rank, size, static_cast<unsigned long>(sequence_), what.c_str());
    error_ = code;
    shared_->error = code;
    notify();
    return code;
}

int Communicator::barrier()
{
    if (size == 1) return 0;
    lock();
    uint64_t generation = shared_->generation;
    if (++shared_->num_arrived == size) {
        shared_->num_arrived = 0;
        shared_->generation++;
        pthread_cond_broadcast(&shared_->changed);
    }
    unlock();
    auto done = [&] { return shared_->generation != generation; };
    return wait(done, everybody_, "a collective");
}

int Communicator::agree(Announcement mine)
{
    mine.sequence = ++sequence_;
    shared_->announcements[sequence_ % 2][rank] = mine;
    if (int error = barrier()) return error;
    for (uint32_t other = 0; other < size; other++) {
        if (!mine.agrees_with(announced(other))) {
            return fail(HCCL_E_PARA, "MISMATCH: " + mine.text() + ", but rank " +
                                         std::to_string(other) + " calls " +
                                         announced(other).text());
        }
    }
    return 0;
}

}  // namespace npusim
