"""Plays gcloud for the tests: no network, no cloud; a TPU host is a folder, and ssh is bash in it.

Everything lives in the folder $FAKE:
  calls      what was asked: arguments end in a NUL, a call in a further one
  states     one state per line, given out in turn by `queued-resources describe`; the last one stays, and STATE@FILE
             is not reached before there is such a file: until then the answer is ACTIVE
  owner      the label of the queued resource
  workers    how many hosts the TPU has
  refuse     how many more `create` calls are refused
  deaf       how many more ssh calls find no host
  hosts/N    the home of host N, gone when the TPU is deleted

It is started hundreds of times: it imports next to nothing.
"""

import os
import sys

FAKE = os.environ["FAKE"]


def read(name, default=""):
    try:
        with open(f"{FAKE}/{name}") as file:
            return file.read()
    except FileNotFoundError:
        return default


def write(name, text):
    with open(f"{FAKE}/{name}", "w") as file:
        file.write(text)


def countdown(name):
    left = int(read(name, "0"))
    write(name, str(max(left - 1, 0)))
    return left > 0


def next_state():
    states = read("states", "ABSENT\n").split()
    state, _, file = states[0].partition("@")
    if file and not os.path.exists(f"{FAKE}/{file}"):
        return "ACTIVE"
    write("states", "\n".join(states[1:] or states))
    return state


def run(*command, **environment):
    return os.spawnvpe(os.P_WAIT, command[0], command, {**os.environ, **environment})


def end_hosts():
    """What is left of a TPU that is taken away: nothing runs, nothing is stored."""
    for host in os.listdir(f"{FAKE}/hosts"):
        group = read(f"hosts/{host}/mmdiff-jobs/latest/job.group").strip()
        if group:
            run("bash", "-c", f"kill -KILL -- -{group} 2>/dev/null")
    run("bash", "-c", f"rm -rf {FAKE}/hosts && mkdir {FAKE}/hosts")


def option(arguments, name):
    found = [a[len(name) + 1 :] for a in arguments if a.startswith(name + "=")]
    return found[-1] if found else None


def hosts(arguments):
    worker = option(arguments, "--worker") or "0"
    for host in range(int(read("workers", "1"))) if worker == "all" else [worker]:
        home = f"{FAKE}/hosts/{host}"
        os.makedirs(home, exist_ok=True)
        yield home


def main(arguments):
    with open(f"{FAKE}/calls", "a") as file:
        file.write("".join(f"{argument}\0" for argument in arguments) + "\0")
    words = [a for a in arguments if a != "alpha" and not a.startswith("--")]
    what = " ".join(words[2:4])
    if what == "queued-resources describe" and "yaml" in option(arguments, "--format"):
        print("state: as described")
    elif what == "queued-resources describe":
        state = next_state()
        if state in ("ABSENT", "ERROR"):
            print("NOT_FOUND: Resource was not found" if state == "ABSENT" else "the network is down", file=sys.stderr)
            return 1
        print("gcloud talks a lot", file=sys.stderr)
        print(f"{state}\t{read('owner')}")
    elif what == "queued-resources create":
        if countdown("refuse"):
            print("RESOURCE_EXHAUSTED: quota", file=sys.stderr)
            return 1
    elif what == "queued-resources delete":
        end_hosts()
    elif what == "tpu-vm describe":
        print(read("workers", "1"))
    elif what == "tpu-vm ssh":
        if countdown("deaf"):
            return 255
        command = "cd\n" + option(arguments, "--command")
        return max([run("bash", "-c", command, HOME=home) for home in hosts(arguments)])
    elif what == "tpu-vm scp":
        source, target = words[4:6]
        for home in hosts(arguments):
            here, there = (home + "/" + path.split(":")[1] if ":" in path else path for path in (source, target))
            run("cp", here, there)
    return 0


sys.exit(main(sys.argv[1:]))
