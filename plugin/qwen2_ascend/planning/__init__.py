"""`qwen2-ascend plan`: which layouts fit, what they move, how long a step may take.

From a model's shape and public figures of a device alone; nothing here imports torch.
docs/planning.md says what the figures mean; tests/planning holds memory and traffic to real runs.

    job.py        what is to be trained on, and one way to cut it
    parameters.py weights of each rank; flops.py the arithmetic of a token
    memory.py     bytes of each rank at the fullest moment of a step
    zero.py       and where DeepSpeed's ZeRO trains
    traffic.py    the collectives of a step
    roofline.py   seconds of a step; fitting.py its constants, from measured steps
    search.py     every valid layout, ranked; the fewest devices that hold the job
    devices.py    memory, arithmetic and bandwidth of devices, with sources
    report.py     a table, launch commands, JSON; picture.py a PNG; command.py the command line
"""
