// Every collective goes in rounds: each rank writes a piece into its slot of the shared memory, all
// meet, each reads what it needs, all meet. Which piece and what is read is all that differs.
#include "hccl_collectives.h"

#include <algorithm>
#include <cstring>
#include <functional>

namespace npusim {

Parts Parts::equal(uint32_t num_ranks, uint64_t count)
{
    Parts parts;
    for (uint32_t rank = 0; rank < num_ranks; rank++) {
        parts.counts.push_back(count);
        parts.offsets.push_back(rank * count);
    }
    return parts;
}

Parts Parts::of(uint32_t num_ranks, const void *counts, const void *offsets)
{
    auto *sizes = static_cast<const uint64_t *>(counts);
    auto *starts = static_cast<const uint64_t *>(offsets);
    return {{sizes, sizes + num_ranks}, {starts, starts + num_ranks}};
}

namespace {

// Elements [at, at + count) of every rank's part.
using Piece = std::function<void(uint64_t at, uint64_t count)>;

class Exchange {
public:
    Exchange(Communicator &comm, const Collective &call) : comm_(comm), call_(call) {}

    // Compares with the other ranks what is about to be done.
    int agree(bool counts_differ = false)
    {
        Announcement mine{};
        std::strncpy(mine.op, call_.op, sizeof mine.op - 1);
        mine.count = call_.count;
        mine.counts_differ = counts_differ;
        mine.dtype = call_.dtype;
        mine.reduction = call_.reduction;
        mine.root = static_cast<int32_t>(call_.root);
        std::copy(call_.sends.counts.begin(), call_.sends.counts.end(), mine.sends);
        return comm_.agree(mine);
    }

    // Every rank has one part, as large as a slot per round.
    int rounds(uint64_t total, const Piece &write, const Piece &read)
    {
        return rounds(total, kSlotBytes / element(), write, read);
    }

    // Every rank has a part for each other rank: the slot is shared out among them.
    int rounds_of_parts(uint64_t total, const Piece &write, const Piece &read)
    {
        return rounds(total, part_bytes() / element(), write, read);
    }

    void write_slot(uint64_t at, uint64_t count)
    {
        std::memcpy(comm_.slot(comm_.rank), sent(at), count * element());
    }

    // Into the slot's part for each rank, as far as its count reaches.
    void write_parts(uint64_t at, uint64_t count)
    {
        for (uint32_t to = 0; to < comm_.size; to++) {
            uint64_t size = clip(at, count, call_.sends.counts[to]);
            std::memcpy(part(comm_.rank, to), sent(call_.sends.offsets[to] + at), size * element());
        }
    }

    // The place of element `at` in the user's buffers.
    const char *sent(uint64_t at) const
    {
        return static_cast<const char *>(call_.send) + at * element();
    }
    char *received(uint64_t at) const
    {
        return static_cast<char *>(call_.receive) + at * element();
    }

    char *part(uint32_t from, uint32_t to) { return comm_.slot(from) + to * part_bytes(); }

    uint64_t element() const { return size_of(call_.dtype); }

    // How many of the elements [at, at + count) a part of `size` elements has.
    static uint64_t clip(uint64_t at, uint64_t count, uint64_t size)
    {
        return at < size ? std::min(count, size - at) : 0;
    }

    int reduce_into(uint64_t at, uint64_t count, const std::vector<const void *> &sources)
    {
        bool done = reduce(received(at), sources, count, call_.dtype, call_.reduction);
        return done ? 0 : comm_.fail(HCCL_E_NOT_SUPPORT, "no reduction of this dtype");
    }

private:
    uint64_t part_bytes() const { return kSlotBytes / comm_.size / 64 * 64; }

    int rounds(uint64_t total, uint64_t step, const Piece &write, const Piece &read)
    {
        for (uint64_t at = 0; at < total; at += step) {
            uint64_t count = std::min(step, total - at);
            write(at, count);
            if (int error = comm_.barrier()) return error;
            read(at, count);
            if (int error = comm_.barrier()) return error;
        }
        return 0;
    }

    Communicator &comm_;
    const Collective &call_;
};

std::vector<const void *> slots(Communicator &comm)
{
    std::vector<const void *> all;
    for (uint32_t rank = 0; rank < comm.size; rank++) all.push_back(comm.slot(rank));
    return all;
}

uint64_t largest(const std::vector<uint64_t> &counts)
{
    return *std::max_element(counts.begin(), counts.end());
}

// The largest part any rank sends: all ranks must go through the same number of rounds.
uint64_t largest_send(const Communicator &comm)
{
    uint64_t most = 0;
    for (uint32_t rank = 0; rank < comm.size; rank++) {
        auto &sends = comm.announced(rank).sends;
        most = std::max(most, *std::max_element(sends, sends + comm.size));
    }
    return most;
}

int reduce_where(Communicator &comm, const Collective &call, bool receives)
{
    Exchange exchange(comm, call);
    if (int error = exchange.agree()) return error;
    auto write = [&](uint64_t at, uint64_t count) { exchange.write_slot(at, count); };
    auto read = [&](uint64_t at, uint64_t count) {
        if (receives) exchange.reduce_into(at, count, slots(comm));
    };
    return exchange.rounds(call.count, write, read);
}

}  // namespace

int barrier(Communicator &comm, const Collective &call) { return Exchange(comm, call).agree(); }

int all_reduce(Communicator &comm, const Collective &call)
{
    return reduce_where(comm, call, true);
}

int reduce_to_root(Communicator &comm, const Collective &call)
{
    return reduce_where(comm, call, comm.rank == call.root);
}

int broadcast(Communicator &comm, const Collective &call)
{
    Exchange exchange(comm, call);
    if (int error = exchange.agree()) return error;
    bool is_root = comm.rank == call.root;
    auto write = [&](uint64_t at, uint64_t count) {
        if (is_root) exchange.write_slot(at, count);
    };
    auto read = [&](uint64_t at, uint64_t count) {
        if (is_root) return;
        std::memcpy(exchange.received(at), comm.slot(call.root), count * exchange.element());
    };
    return exchange.rounds(call.count, write, read);
}

int all_gather(Communicator &comm, const Collective &call)
{
    Exchange exchange(comm, call);
    if (int error = exchange.agree(/*counts_differ=*/true)) return error;
    for (uint32_t from = 0; from < comm.size; from++) {
        uint64_t expected = call.receives.counts[from];
        uint64_t sent = comm.announced(from).count;
        if (expected != sent) {
            return comm.fail(HCCL_E_PARA, "MISMATCH: " + std::string(call.op) + " expects " +
                                              std::to_string(expected) + " elements of rank " +
                                              std::to_string(from) + ", which sends " +
                                              std::to_string(sent));
        }
    }
    auto write = [&](uint64_t at, uint64_t count) {
        exchange.write_slot(at, Exchange::clip(at, count, call.count));
    };
    auto read = [&](uint64_t at, uint64_t count) {
        for (uint32_t from = 0; from < comm.size; from++) {
            uint64_t size = Exchange::clip(at, count, call.receives.counts[from]);
            std::memcpy(exchange.received(call.receives.offsets[from] + at), comm.slot(from),
                        size * exchange.element());
        }
    };
    return exchange.rounds(largest(call.receives.counts), write, read);
}

int reduce_scatter(Communicator &comm, const Collective &call)
{
    Exchange exchange(comm, call);
    if (int error = exchange.agree(/*counts_differ=*/true)) return error;
    for (uint32_t from = 0; from < comm.size; from++) {
        uint64_t sent = comm.announced(from).sends[comm.rank];
        if (sent != call.count) {
            return comm.fail(HCCL_E_PARA, "MISMATCH: " + std::string(call.op) + " of " +
                                              std::to_string(call.count) + " elements, but rank " +
                                              std::to_string(from) + " has " +
                                              std::to_string(sent) + " for it");
        }
    }
    std::vector<const void *> mine;
    for (uint32_t from = 0; from < comm.size; from++) {
        mine.push_back(exchange.part(from, comm.rank));
    }
    auto write = [&](uint64_t at, uint64_t count) { exchange.write_parts(at, count); };
    auto read = [&](uint64_t at, uint64_t count) {
        uint64_t size = Exchange::clip(at, count, call.count);
        if (size) exchange.reduce_into(at, size, mine);
    };
    return exchange.rounds_of_parts(largest_send(comm), write, read);
}

int scatter(Communicator &comm, const Collective &call)
{
    Exchange exchange(comm, call);
    if (int error = exchange.agree()) return error;
    auto write = [&](uint64_t at, uint64_t count) {
        if (comm.rank == call.root) exchange.write_parts(at, count);
    };
    auto read = [&](uint64_t at, uint64_t count) {
        std::memcpy(exchange.received(at), exchange.part(call.root, comm.rank),
                    count * exchange.element());
    };
    return exchange.rounds_of_parts(call.count, write, read);
}

int all_to_all(Communicator &comm, const Collective &call)
{
    Exchange exchange(comm, call);
    if (int error = exchange.agree(/*counts_differ=*/true)) return error;
    for (uint32_t from = 0; from < comm.size; from++) {
        uint64_t expected = call.receives.counts[from];
        uint64_t sent = comm.announced(from).sends[comm.rank];
        if (expected != sent) {
            return comm.fail(HCCL_E_PARA, "MISMATCH: " + std::string(call.op) + " expects " +
                                              std::to_string(expected) + " elements of rank " +
                                              std::to_string(from) + ", which sends " +
                                              std::to_string(sent));
        }
    }
    auto write = [&](uint64_t at, uint64_t count) { exchange.write_parts(at, count); };
    auto read = [&](uint64_t at, uint64_t count) {
        for (uint32_t from = 0; from < comm.size; from++) {
            uint64_t size = Exchange::clip(at, count, call.receives.counts[from]);
            std::memcpy(exchange.received(call.receives.offsets[from] + at),
                        exchange.part(from, comm.rank), size * exchange.element());
        }
    };
    return exchange.rounds_of_parts(largest_send(comm), write, read);
}

}  // namespace npusim
