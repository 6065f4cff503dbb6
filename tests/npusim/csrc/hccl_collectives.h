// The collectives, as calls that run on a stream's thread.
#pragma once

#include <vector>

#include "hccl_communicator.h"

namespace npusim {

// Elements for or from each rank, and where they begin.
struct Parts {
    std::vector<uint64_t> counts;
    std::vector<uint64_t> offsets;

    static Parts equal(uint32_t num_ranks, uint64_t count);
    static Parts of(uint32_t num_ranks, const void *counts, const void *offsets);
};

struct Collective {
    const char *op;
    HcclDataType dtype;
    const void *send = nullptr;
    void *receive = nullptr;
    uint64_t count = 0;
    HcclReduceOp reduction = HCCL_REDUCE_SUM;
    uint32_t root = 0;
    Parts sends = {};
    Parts receives = {};
};

// Each returns 0 or the error that the communicator then keeps.
int barrier(Communicator &comm, const Collective &call);
int broadcast(Communicator &comm, const Collective &call);
int all_reduce(Communicator &comm, const Collective &call);
int reduce_to_root(Communicator &comm, const Collective &call);
int all_gather(Communicator &comm, const Collective &call);      // `receives` may be uneven
int reduce_scatter(Communicator &comm, const Collective &call);  // `sends` may be uneven
int scatter(Communicator &comm, const Collective &call);
int all_to_all(Communicator &comm, const Collective &call);

// Sends and receives that belong together: none waits for another to end.
int send_receive(Communicator &comm, const std::vector<HcclSendRecvItem> &items);

}  // namespace npusim
