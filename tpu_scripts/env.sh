# shellcheck shell=bash disable=SC2034 # the scripts that source this file use what is set here
# The settings of the scripts that talk to a TPU: export them, or write them into a file and name it in TPU_ENV.

if [[ -n "${TPU_ENV:-}" ]]; then
  # shellcheck source=/dev/null
  source "$TPU_ENV"
fi

setting TPU_PROJECT "the Google Cloud project, for example: export TPU_PROJECT=my-project"
setting TPU_ZONE "the zone, for example: export TPU_ZONE=us-east5-a"
setting TPU_NAME "a name of your choice for the TPU, for example: export TPU_NAME=mmdiff-1"
setting TPU_TYPE "the accelerator type, for example: export TPU_TYPE=v6e-16"

# the generation decides the machine image and the compiler flags
case $TPU_TYPE in
  v4-*) GENERATION=v4 IMAGE_OF_GENERATION=tpu-ubuntu2204-base ;;
  v5litepod-* | v5e-*) GENERATION=v5e IMAGE_OF_GENERATION=v2-alpha-tpuv5-lite ;;
  v5p-*) GENERATION=v5p IMAGE_OF_GENERATION=v2-alpha-tpuv5 ;;
  v6e-*) GENERATION=v6e IMAGE_OF_GENERATION=v2-alpha-tpuv6e ;;
  tpu7x-*) GENERATION=tpu7x IMAGE_OF_GENERATION="" ;; # machines of this generation come only through GKE: xpk_launch.sh
  *) die "TPU_TYPE=$TPU_TYPE is of no known generation: use v4-8, v5litepod-16, v5p-8, v6e-16, tpu7x-2x2x2 or the like" 2 ;;
esac
: "${TPU_IMAGE:=$IMAGE_OF_GENERATION}" # gcloud's --runtime-version

# a label on what create.sh makes; only what carries yours is ever deleted without --yes
: "${TPU_OWNER:=$(id -un)}"
TPU_OWNER=${TPU_OWNER,,} TPU_OWNER=${TPU_OWNER//[^a-z0-9_-]/_} # what a label may hold

# further words for gcloud, for example TPU_SSH_FLAGS=--internal-ip or TPU_CREATE_FLAGS="--network=mine --subnetwork=mine"
read -ra SSH_FLAGS <<<"${TPU_SSH_FLAGS:-}"
read -ra CREATE_FLAGS <<<"${TPU_CREATE_FLAGS:-}"

# seconds between two looks at something that takes its time
: "${POLL_SECONDS:=60}"

PLACE=(--project="$TPU_PROJECT" --zone="$TPU_ZONE")
SSH=(gcloud compute tpus tpu-vm ssh "$TPU_NAME" "${PLACE[@]}" --quiet "${SSH_FLAGS[@]}")
SCP=(gcloud compute tpus tpu-vm scp "${PLACE[@]}" --quiet "${SSH_FLAGS[@]}")
