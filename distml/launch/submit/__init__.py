"""The same job on a cluster: what is sent, how it is started there, and the handle that finds it again.

files     which files of a working directory travel, and what stays behind
archive   the one archive that is uploaded: those files and distml's own source
checks    whether what a job needs travels with it
written   a spec's paths as they stand in it
request   the job as Ray's Jobs API takes it; pure text
contact   whether a Ray dashboard answers at an address, and with which token
jobs      submit, status, logs and stop, over Ray's JobSubmissionClient
handle    job.json in the local run directory, and `distml.submit`
remote    what runs on the cluster: `distml run` in a directory of its own
command   the verbs of the command line
"""
