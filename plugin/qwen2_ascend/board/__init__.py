"""`qwen2-ascend board`: a page on which plans, runs, reports and models are looked at.

A small web server (Starlette on uvicorn) and one page of plain JavaScript; docs/board.md says why
it is no Gradio page. Nothing here imports torch: what needs it runs in a process of its own.

    jail.py         names of files below the folders that the board may see
    listing.py      what these folders hold: runs, reports, models, data
    metrics.py      a metrics.jsonl that grows, read on from where it was left, in bounded memory
    runs.py         a run: its state, configuration, environment, checkpoints and log
    noise.py        how far two equal runs are apart, and whether a third one is further
    plans.py        the planner's table, and a layout as a launch command
    scheduling.py   that command on one node, for Slurm, for Volcano
    precision.py    the reports of launch/align_qwen2.py
    preview.py      the first chats of a file and what of them is trained on (a process of its own)
    job.py          the one fine-tuning run that a board has: its command, its log, its end
    talker.py       a process that holds a model and answers: talking.py, with answering.py
    server.py       the pages' requests; access.py is who may make them
    command.py      the command line
    benchmark.py    how fast a folder of many long runs opens
    static/         the page
"""
