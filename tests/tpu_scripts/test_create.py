"""create.sh and delete.sh: the exact requests, the wait, and what is deleted."""

import pytest

from .conftest import OWNER

PLACE = ["--project=project", "--zone=zone"]
NOUN = ["compute", "tpus", "queued-resources"]


def request(*capacity, track=()):
    return [
        *track,
        *NOUN,
        "create",
        "name",
        "--node-id=name",
        *PLACE,
        "--accelerator-type=v6e-16",
        "--runtime-version=v2-alpha-tpuv6e",
        f"--labels=mmdiff_owner={OWNER}",
        "--quiet",
        *capacity,
    ]


DELETION = [*NOUN, "delete", "name", *PLACE, "--quiet"]


def changes(cloud):
    """The calls that change something, in order."""
    return [call for call in cloud.calls() if {"create", "delete"} & set(call)]


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["--spot"], request("--spot")),
        (["--reserved"], request("--reserved")),
        (["--reservation", "mine"], request("--reservation=mine", track=["alpha"])),
        (["--flex", "12h"], request("--provisioning-model=flex-start", "--max-run-duration=12h", track=["alpha"])),
        (["--on-demand"], request()),
    ],
)
def test_the_request(cloud, arguments, expected):
    cloud.write("states", "ABSENT", "ACTIVE")
    cloud.run("create.sh", *arguments)
    assert changes(cloud) == [expected]


@pytest.mark.parametrize(
    "kind, image",
    [("v4-8", "tpu-ubuntu2204-base"), ("v5litepod-16", "v2-alpha-tpuv5-lite"), ("v5p-8", "v2-alpha-tpuv5")],
)
def test_the_image_follows_the_generation(cloud, kind, image):
    printed = cloud.run("create.sh", "--spot", "--dry-run", TPU_TYPE=kind).stdout
    assert f"--accelerator-type={kind} --runtime-version={image} " in printed


def test_it_waits_until_active(cloud):
    cloud.write(
        "states", "ABSENT", "WAITING_FOR_RESOURCES", "WAITING_FOR_RESOURCES", "PROVISIONING", "ERROR", "ACTIVE", "LATER"
    )
    said = cloud.run("create.sh", "--spot").stderr
    assert changes(cloud) == [request("--spot")]
    assert cloud.read("states") == "LATER"  # not asked again
    assert said.count("WAITING_FOR_RESOURCES") == 1  # each change is told once


def test_no_wait(cloud):
    cloud.write("states", "ABSENT", "WAITING_FOR_RESOURCES")
    cloud.run("create.sh", "--spot", "--no-wait")
    assert len(cloud.calls("describe")) == 1


def test_an_active_tpu_is_left_alone(cloud):
    cloud.write("states", "ACTIVE")
    cloud.run("create.sh", "--spot")
    assert changes(cloud) == []


@pytest.mark.parametrize("state", ["FAILED", "SUSPENDED"])
def test_a_request_that_ended_is_deleted_and_made_again(cloud, state):
    cloud.write("states", state, "DELETING", "ABSENT", "PROVISIONING", "ACTIVE")
    said = cloud.run("create.sh", "--spot").stderr
    assert changes(cloud) == [DELETION, request("--spot")]  # without --force: gcloud itself refuses to delete machines
    assert f"name is {state}: deleting" in said


def test_a_request_that_fails_while_waiting_is_made_again(cloud):
    cloud.write("states", "ABSENT", "WAITING_FOR_RESOURCES", "FAILED", "ABSENT", "ACTIVE")
    cloud.run("create.sh", "--spot")
    assert changes(cloud) == [request("--spot"), DELETION, request("--spot")]


@pytest.mark.parametrize("state", ["FAILED", "SUSPENDED"])
@pytest.mark.parametrize("owner", ["bob", ""])
def test_what_belongs_to_somebody_else_is_not_deleted(cloud, state, owner):
    cloud.write("states", state)
    cloud.write("owner", owner)
    error = cloud.run("create.sh", "--spot", code=1).stderr
    assert changes(cloud) == []
    assert "mmdiff_owner" in error and "delete.sh --yes" in error


def test_it_gives_up_in_the_end(cloud):
    cloud.write("states", *["ABSENT", "FAILED"] * 10)
    assert "CREATE_ATTEMPTS" in cloud.run("create.sh", "--spot", code=1, CREATE_ATTEMPTS="3").stderr
    assert len(cloud.calls("create")) == 3


def test_a_refused_first_request_is_an_error(cloud):
    cloud.write("refuse", 1)
    assert "quota" in cloud.run("create.sh", "--spot", code=1).stderr
    assert len(cloud.calls("create")) == 1


def test_a_refused_later_request_is_repeated(cloud):
    cloud.write("refuse", 2)
    cloud.write("states", "SUSPENDED", "ABSENT", "ABSENT", "ABSENT", "ACTIVE")
    cloud.run("create.sh", "--spot")
    assert len(cloud.calls("create")) == 3


def test_gcloud_that_never_answers_ends_it_without_a_request(cloud):
    cloud.write("states", "ERROR")
    assert "the network is down" in cloud.run("create.sh", "--spot", code=1).stderr
    assert changes(cloud) == []


@pytest.mark.parametrize("arguments", [[], ["--spot", "--reserved"]])
def test_the_capacity_is_chosen_by_the_caller(cloud, arguments):
    assert "--spot, --reserved" in cloud.run("create.sh", *arguments, code=2).stderr


def test_tpu7x_is_sent_to_gke(cloud):
    assert "xpk_launch.sh" in cloud.run("create.sh", "--spot", code=2, TPU_TYPE="tpu7x-2x2x2").stderr


def test_delete_wants_a_yes(cloud):
    assert "delete.sh --yes" in cloud.run("delete.sh", code=2).stderr
    assert cloud.calls() == []
    cloud.run("delete.sh", "--yes")
    assert cloud.calls() == [[*NOUN, "delete", "name", *PLACE, "--force", "--quiet"]]
