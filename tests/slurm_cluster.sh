#!/usr/bin/env bash
# A SLURM cluster of one node on loopback, for tests: no systemd, no port or file outside its folder and the ports it is given.
#   slurm_cluster.sh start FOLDER PORT [accounting]   uses PORT..PORT+3; returns when a job could start, prints nothing
#   slurm_cluster.sh stop FOLDER                      ends the jobs, then the daemons, by the pids in their own files
#   slurm_cluster.sh guard FOLDER PID                 does so when process PID is gone, and then deletes FOLDER
# Its configuration is FOLDER/slurm.conf: clients need SLURM_CONF set to it.
set -euo pipefail
action=${1:?start, stop or guard} folder=${2:?the folder of the cluster}
export SLURM_CONF=$folder/slurm.conf

lives() { [ -s "$1" ] && [ "$(cat "/proc/$(cat "$1")/comm" 2>/dev/null)" = "$2" ]; }
until_true() { # SECONDS WHAT COMMAND...: wait for it, or say what never happened and show the daemons' last words
  local end=$((SECONDS + $1)) what=$2
  shift 2
  until "$@" >/dev/null 2>&1; do
    if [ "$SECONDS" -ge "$end" ]; then
      echo "slurm_cluster.sh: $what" >&2
      tail -n 15 "$folder"/log/* >&2
      exit 1
    fi
    sleep 0.1
  done
}

authentication() {
  mkdir -p "$folder"/{munge,state,spool,log}
  chmod 755 "$folder" "$folder/munge"
  (umask 077 && head -c 1024 /dev/urandom >"$folder/munge/key")
  munged --key-file="$folder/munge/key" --socket="$folder/munge/socket" --pid-file="$folder/munge/pid" --seed-file="$folder/munge/seed" --log-file="$folder/log/munge"
}

configuration() { # PORT [accounting]
  local storage="AccountingStorageType=accounting_storage/none"
  [ "${2:-}" = accounting ] && storage="AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort=$(($1 + 2))
AccountingStoragePass=$folder/munge/socket"
  # More processors than there are, nothing bound or measured: jobs that mostly wait run side by side. A requeued job starts again when its old
  # credential is out of date: 120 s, unless cred_expire says less. High takes the node from low, after a signal and ten seconds.
  cat >"$SLURM_CONF" <<CONF
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort=$1
SlurmdPort=$(($1 + 1))
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge/socket,cred_expire=5
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/log/slurmctld
SlurmdLogFile=$folder/log/slurmd
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=1,batch_sched_delay=0,sched_min_interval=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
SlurmdParameters=config_overrides
JobRequeue=1
ReturnToService=2
KillWait=5
OverTimeLimit=0
InactiveLimit=0
MinJobAge=${MIN_JOB_AGE:-3600}
MessageTimeout=30
SlurmdTimeout=300
$storage
NodeName=localhost NodeAddr=127.0.0.1 CPUs=${CPUS:-8} RealMemory=${MEMORY:-8000} State=UNKNOWN
PartitionName=low Nodes=localhost Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=10
PartitionName=high Nodes=localhost MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
CONF
}

database() { # PORT: MariaDB and slurmdbd before it
  local files=$folder/database
  mkdir -p "$files"
  mariadb-install-db --no-defaults --user=root --datadir="$files/data" --auth-root-authentication-method=normal --skip-test-db >"$folder/log/mariadb-install" 2>&1
  mariadbd --no-defaults --user=root --datadir="$files/data" --socket="$files/socket" --pid-file="$files/pid" --bind-address=127.0.0.1 --port=$(($1 + 3)) \
    --innodb-buffer-pool-size=64M --innodb-log-file-size=16M --innodb-lock-wait-timeout=900 --innodb-flush-log-at-trx-commit=0 --skip-log-bin >"$folder/log/mariadb" 2>&1 </dev/null &
  until_true 60 "MariaDB did not start" mariadb-admin --no-defaults --socket="$files/socket" ping
  mariadb --no-defaults --socket="$files/socket" -e "CREATE USER 'slurm'@'127.0.0.1' IDENTIFIED BY 'slurm'; CREATE USER 'slurm'@'localhost' IDENTIFIED BY 'slurm';
    CREATE DATABASE slurm_acct_db; GRANT ALL ON slurm_acct_db.* TO 'slurm'@'127.0.0.1'; GRANT ALL ON slurm_acct_db.* TO 'slurm'@'localhost'"
  (
    umask 077 # slurmdbd refuses to start where others could read its password
    cat >"$folder/slurmdbd.conf" <<CONF
AuthType=auth/munge
AuthInfo=socket=$folder/munge/socket
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort=$(($1 + 2))
SlurmUser=root
PidFile=$folder/slurmdbd.pid
LogFile=$folder/log/slurmdbd
CommunicationParameters=NoInAddrAny
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort=$(($1 + 3))
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm_acct_db
CONF
  )
  slurmdbd
  until_true 60 "slurmdbd does not answer" sacctmgr -n list cluster
  sacctmgr -i add cluster test >/dev/null
}

node_is_up() { sinfo -h -o %T | grep -qE '^(idle|mixed|allocated)$'; }

start() {
  authentication
  configuration "$@"
  [ "${2:-}" = accounting ] && database "$1"
  slurmctld 2>>"$folder/log/start"
  slurmd -N localhost 2>>"$folder/log/start"
  until_true 60 "the node did not come up" node_is_up
}

stop() {
  if lives "$folder/slurmctld.pid" slurmctld; then
    timeout 10 squeue -h -o %A | xargs -r timeout 10 scancel --full --signal=KILL || true # at once, not after KillWait
    timeout 10 squeue -h -o %A | xargs -r timeout 10 scancel || true
    for _ in $(seq 40); do [ -z "$(timeout 10 squeue -h)" ] && break; sleep 0.2; done
  fi
  for pair in slurmd:slurmd.pid slurmctld:slurmctld.pid slurmdbd:slurmdbd.pid mariadbd:database/pid munged:munge/pid; do
    file=$folder/${pair#*:}
    lives "$file" "${pair%%:*}" || continue
    pid=$(cat "$file")
    kill "$pid"
    for _ in $(seq 100); do [ -d "/proc/$pid" ] || break; sleep 0.1; done
    [ -d "/proc/$pid" ] && kill -KILL "$pid"
  done
  return 0
}

guard() {
  while [ -d "$folder" ] && kill -0 "$1" 2>/dev/null; do sleep 1; done
  [ -d "$folder" ] && stop && rm -rf "$folder"
  return 0
}

shift 2
"$action" "$@"
