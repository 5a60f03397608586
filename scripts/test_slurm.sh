#!/usr/bin/env bash
# A real Slurm on this one machine, for the tests: no systemd, no cgroups, GPUs in name only.
#   test_slurm.sh up            start it and leave it up; a usable Slurm that already answers is left as it is
#   test_slurm.sh down          stop what `up` started, jobs included, and nothing else
#   test_slurm.sh run COMMAND…  up, COMMAND, down (unless it was up before); exits with COMMAND's code
#   test_slurm.sh node NAME     start the slurmd of a node again, where it was killed
# Partitions: main, and high, which preempts main (user signal immediately, requeue after 20 s).
# TEST_SLURM_NODES=1                   more: nodes n1, n2 … of this machine, each with a slurmd and a host name of its own,
#                                      on ports from 17001; one that does not answer counts as down after 10 s
# TEST_SLURM_GPUS=2 TEST_SLURM_CPUS=8  what each node offers; may be more than the machine has: nothing is bound or limited
# TEST_SLURM_ACCOUNTING=0              1: with MariaDB and slurmdbd, so that sacct answers
# Exit code 69: Slurm cannot be set up here (not root, not Debian, no packages, another Slurm's configuration).
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin
count=${TEST_SLURM_NODES:-1} gpus=${TEST_SLURM_GPUS:-2} cpus=${TEST_SLURM_CPUS:-8} accounting=${TEST_SLURM_ACCOUNTING:-0}
etc=/etc/slurm run=/run/test-slurm log=/var/log/test-slurm state=/var/spool/test-slurm cluster=testslurm
mark='# written by test_slurm.sh, removed by its down'
host=$(hostname -s)
nodes=("$host")
[ "$count" = 1 ] || mapfile -t nodes < <(seq -f 'n%g' "$count")

say() { echo "test_slurm: $*" >&2; }
usage() { sed -n '3,6s/^# *//p' "$0" >&2; exit 2; }
unavailable() { say "$*"; exit 69; }

broken() { # LOG MESSAGE
  [ ! -e "$1" ] || tail -n 20 "$1" >&2
  say "$2"
  exit 1
}

until_true() { # SECONDS COMMAND…
  local end=$((SECONDS + $1))
  shift
  until "$@" >/dev/null 2>&1; do
    [ $SECONDS -lt $end ] || return 1
    sleep 0.2
  done
}

daemon_pid() { # NAME, or NAME-NODE: the process of its pidfile, if it is that daemon: pids are reused
  local pid
  pid=$(cat "$run/$1.pid" 2>/dev/null) && [ "$(cat "/proc/$pid/comm" 2>/dev/null)" = "${1%%-*}" ] && echo "$pid"
}

gone() { ! daemon_pid "$1"; }
no_jobs() { [ -z "$(timeout 5 squeue -h)" ]; }
munge_answers() { munge -n | unmunge; }

usable() { # both partitions have as many nodes that accept jobs
  local partition ready
  command -v sinfo >/dev/null || return 1
  for partition in main high; do
    ready=$(timeout 5 sinfo -h -N -p $partition -o '%a %T' 2>/dev/null | grep -Ecx 'up (idle|mixed|allocated)') || return 1
    [ "$ready" -ge "$count" ] || return 1
  done
}

offer() { sinfo -o '%9P %6a %10n %9T %c CPUs, %m MB, %G'; }

need_packages() {
  local commands=(munged munge slurmctld slurmd sbatch) packages=(munge slurmctld slurmd slurm-client)
  if [ "$accounting" = 1 ]; then
    commands+=(slurmdbd mariadbd) packages+=(slurmdbd mariadb-server)
  fi
  [ "$(for c in "${commands[@]}"; do command -v "$c" || true; done | wc -l)" -lt ${#commands[@]} ] || return 0
  command -v apt-get >/dev/null || unavailable "Slurm is not installed, and only on Debian can this script install it"
  say "installing ${packages[*]}"
  export DEBIAN_FRONTEND=noninteractive
  { apt-get update -qq && apt-get install -y -qq --no-install-recommends "${packages[@]}"; } >/dev/null ||
    unavailable "apt-get cannot install ${packages[*]}"
}

start_munge() {
  ! munge_answers >/dev/null 2>&1 || return 0
  [ -s /etc/munge/munge.key ] || runuser -u munge -- mungekey --create || broken "" "there is no munge key"
  install -d -o munge -g munge -m 0755 /run/munge
  { runuser -u munge -- munged && until_true 10 munge_answers; } ||
    broken /var/log/munge/munged.log "munged did not start"
  cp /run/munge/munged.pid $run/munged.pid
}

start_accounting() {
  if ! mariadb-admin ping >/dev/null 2>&1; then
    install -d -o mysql -g mysql -m 0755 /run/mysqld
    setsid mariadbd --user=mysql --skip-networking --pid-file=/run/mysqld/test-slurm.pid \
      >$log/mariadbd.log 2>&1 </dev/null &
    until_true 60 mariadb-admin ping || broken $log/mariadbd.log "MariaDB did not start"
    cp /run/mysqld/test-slurm.pid $run/mariadbd.pid
  fi
  # root reaches the database over its socket: no password to keep; slurmdbd still insists on a private file
  (umask 077 && cat >$etc/slurmdbd.conf) <<END
$mark
DbdHost=localhost
SlurmUser=root
PidFile=$run/slurmdbd.pid
LogFile=$log/slurmdbd.log
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=test_slurm
END
  { slurmdbd && until_true 60 sacctmgr -n show cluster; } || broken $log/slurmdbd.log "slurmdbd did not start"
  [ -n "$(sacctmgr -n show cluster $cluster)" ] || sacctmgr -i add cluster $cluster >/dev/null
}

configure() {
  local i gres='' memory
  memory=$(awk '/^MemTotal/ {print int($2 / 1200)}' /proc/meminfo)
  echo "$mark" >$etc/gres.conf
  if [ "$gpus" -gt 0 ]; then
    for ((i = 0; i < gpus; i++)); do # slurmd wants device nodes, and takes the index from the name's end
      [ -c $run/gpu$i ] || mknod $run/gpu$i c 1 3 || unavailable "no device nodes here: try TEST_SLURM_GPUS=0"
    done
    printf 'AutoDetect=off\nNodeName=%s Name=gpu File=%s/gpu[0-%d] Flags=nvidia_gpu_env\n' \
      "$(IFS=, && echo "${nodes[*]}")" $run $((gpus - 1)) >>$etc/gres.conf
    gres=Gres=gpu:$gpus
  fi
  cat >$etc/slurm.conf <<END
$mark
ClusterName=$cluster
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
SlurmctldPidFile=$run/slurmctld.pid
SlurmdPidFile=$run/slurmd-%n.pid
SlurmctldLogFile=$log/slurmctld.log
SlurmdLogFile=$log/slurmd-%n.log
StateSaveLocation=$state/slurmctld
SlurmdSpoolDir=$state/slurmd-%n
ReturnToService=2
# no cgroups, no binding, no measuring; this file says how many CPUs there are
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SlurmdParameters=config_overrides
# GPUs by --gpus-per-node and the like need cons_tres
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
# a requeued job waits until its old credential has expired, two minutes by default
AuthInfo=cred_expire=5
KillWait=10
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
PartitionName=main Nodes=ALL Default=YES PriorityTier=1 GraceTime=20
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF
END
  [ "$count" = 1 ] || echo SlurmdTimeout=10 >>$etc/slurm.conf
  for ((i = 0; i < count; i++)); do
    echo "NodeName=${nodes[i]} NodeHostname=$host NodeAddr=127.0.0.1 $([ "$count" = 1 ] || echo "Port=$((17001 + i))")" \
      "CPUs=$cpus RealMemory=$((memory / count)) $gres" >>$etc/slurm.conf
  done
  [ "$accounting" != 1 ] || echo AccountingStorageType=accounting_storage/slurmdbd >>$etc/slurm.conf
}

start_node() { # NAME: its slurmd, which takes another host name where there are several
  [[ " ${nodes[*]} " = *" $1 "* ]] || unavailable "there is no node $1 here: ${nodes[*]}"
  mkdir -p "$state/slurmd-$1"
  if daemon_pid "slurmd-$1" >/dev/null; then return; fi
  if [ "$count" = 1 ]; then
    slurmd
  else
    unshare --uts bash -c 'hostname "$1" && exec slurmd -N "$1"' slurmd "$1"
  fi || broken "$log/slurmd-$1.log" "slurmd of $1 did not start"
}

up() {
  local name
  if usable; then
    say "a Slurm with main and high already answers: it is used as it is"
    offer
    return
  fi
  [ "$(id -u)" = 0 ] || unavailable "only root can start a Slurm here"
  [ ! -e $etc/slurm.conf ] || grep -qxF "$mark" $etc/slurm.conf || unavailable "$etc/slurm.conf is another Slurm's"
  getent hosts "$host" >/dev/null || unavailable "$host does not resolve: put '127.0.0.1 $host' into /etc/hosts"
  if daemon_pid slurmctld >/dev/null && [ "$(grep -c ^NodeName= $etc/slurm.conf)" != "$count" ]; then
    say "one with another number of nodes is up: $0 down" && exit 1
  fi
  [ "$count" = 1 ] || unshare --uts true 2>/dev/null || unavailable "no UTS namespaces here: one node is the most"
  need_packages
  mkdir -p $etc $run $log $state/slurmctld
  start_munge
  configure
  [ "$accounting" != 1 ] || daemon_pid slurmdbd >/dev/null || start_accounting
  daemon_pid slurmctld >/dev/null || slurmctld || broken $log/slurmctld.log "slurmctld did not start"
  for name in "${nodes[@]}"; do start_node "$name"; done
  until_true 60 usable || broken $log/slurmctld.log "not every node became idle"
  offer
}

end_unseen() { # jobs of a node whose slurmd was killed live on, and no scancel reaches them
  local process
  for process in /proc/[0-9]*; do
    if grep -qszx "SLURM_CLUSTER_NAME=$cluster" "$process/environ" ||
      { [ "$(cat "$process/comm" 2>/dev/null)" = slurmstepd ] && ls -l "$process/fd" 2>/dev/null | grep -q " $log/"; }; then
      [ "${process#/proc/}" = $$ ] || kill -9 "${process#/proc/}" 2>/dev/null || true
    fi
  done
}

down() {
  local name pid
  [ -d $run ] || return 0 # what is up, if anything, was not started here
  [ "$(id -u)" = 0 ] || unavailable "only root can stop it"
  if daemon_pid slurmctld >/dev/null; then # jobs would outlive the daemons
    timeout 20 squeue -h -o %A | sort -u | xargs -r timeout 20 scancel || true
    until_true 30 no_jobs || say "some jobs do not end"
  fi
  end_unseen
  for name in $(cd $run && ls slurmd-*.pid 2>/dev/null | sed 's/\.pid$//') slurmctld slurmdbd mariadbd munged; do
    if pid=$(daemon_pid $name); then
      kill "$pid"
      until_true 30 gone $name || broken "$log/$name.log" "$name ($pid) does not stop"
    fi
  done
  # a configuration without a controller behind it would let sinfo and sbatch hang; the job numbers in $state continue
  for name in slurm.conf gres.conf slurmdbd.conf; do
    ! grep -qxF "$mark" $etc/$name 2>/dev/null || rm $etc/$name
  done
  rm -rf $run
}

run_in() { # COMMAND…
  local child code
  if ! usable; then
    trap 'code=$?; trap "" INT TERM HUP; down; exit $code' EXIT
  fi
  up
  # in the background, bash would have the command ignore Ctrl-C (hence env); in the foreground, bash could not pass on a TERM
  env --default-signal=INT,QUIT "$@" <&0 &
  child=$!
  trap 'kill -TERM $child 2>/dev/null || true' TERM
  trap : INT
  while
    code=0
    wait $child || code=$?
    kill -0 $child 2>/dev/null
  do :; done
  return $code
}

case ${1-}:$# in
  up:1 | down:1) "$1" ;;
  node:2) start_node "$2" ;;
  run:1) usage ;;
  run:*) run_in "${@:2}" ;;
  *) usage ;;
esac
