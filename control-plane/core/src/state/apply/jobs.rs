//! Runs of jobs: asked for, begun, counted and ended. The leader decides ([`crate::jobs`]); each step is looked at
//! again here, so that no instant of a schedule ever has two runs and no copy that is done runs again.

use std::collections::BTreeMap;

use optimus_common::RunId;
use optimus_common::spec::job::{PARAM_MAX, PAYLOAD_MAX};
use optimus_common::spec::{Kind, PayloadRule, Runs, WorkloadSpec};

use super::*;

/// Slots are numbered anew from here on; copies of the first runs have long gone.
const INDEX_MAX: u32 = u32::MAX - COPIES_MAX;

impl Step<'_> {
    pub(super) fn start_run(&mut self, order: RunOrder) -> Applied {
        let RunOrder { key, id, params, payload } = order;
        let (workload, spec) = match self.running_job(&key) {
            Ok(found) => found,
            Err(refusal) => return Applied::Refused(refusal),
        };
        if self.state.runs_of(&key).any(|run| run.id == id) {
            return self.unchanged(); // proposed twice
        }
        let rules = spec.job_runs();
        if let Err(refusal) =
            check_input(&rules, &params, payload.as_ref().map(|p| p.as_slice())).and_then(|()| self.room_for_run(&key, &rules))
        {
            return Applied::Refused(refusal);
        }
        self.new_run(&key, id, Trigger::Request, workload.release, None, params, payload);
        self.done()
    }

    pub(super) fn cancel_run(&mut self, key: WorkloadKey, number: u64) -> Applied {
        match self.state.run(&key, number) {
            None => Applied::Refused(Refusal::NoSuchRun(key, number)),
            Some(run) if run.phase == RunPhase::Cancelled => self.unchanged(),
            Some(run) if run.phase.is_final() => Applied::Refused(Refusal::RunOver(key, number)),
            Some(run) => {
                let run = JobRun::clone(run);
                self.end_run(run, RunPhase::Cancelled, Some(Reason::Cancelled));
                self.done()
            }
        }
    }

    pub(super) fn run_steps(&mut self, steps: Vec<RunStep>) -> Applied {
        let mut changed = false;
        for step in steps {
            changed |= self.run_step(step).is_some();
        }
        if changed { self.done() } else { self.unchanged() }
    }

    /// Nothing: the world has moved on since it was decided.
    fn run_step(&mut self, step: RunStep) -> Option<()> {
        match step {
            RunStep::Arm { key, release, decided, next } => {
                self.running_job(&key).ok().filter(|(w, _)| w.release == release)?;
                let mut row = self.job_row(&key);
                row.armed_release = release;
                row.decided = row.decided.max(decided);
                row.next = next;
                self.put_job(key, row);
            }
            RunStep::Due { key, due, start, next } => {
                let (workload, spec) = self.running_job(&key).ok()?;
                let mut row = self.job_row(&key);
                if due.at <= row.decided || row.armed_release != workload.release {
                    return None; // an instant is decided once
                }
                row.decided = due.at;
                row.next = next;
                let start = start.and_then(|id| match self.room_for_run(&key, &spec.job_runs()) {
                    Ok(()) => Ok(id),
                    Err(_) => Err(SkipReason::Full),
                });
                if let Err(why) = &start {
                    row.skipped += 1;
                    row.last_skip = Some(Skip { at: due.at, why: why.clone() });
                }
                self.put_job(key.clone(), row);
                match start {
                    Ok(id) => self.new_run(&key, id, Trigger::Schedule, workload.release, Some(&due), BTreeMap::new(), None),
                    Err(why) => self.event(EventKind::RunSkipped, &key.to_string(), &skipped(&due, &why), None),
                }
            }
            RunStep::Deploy { key, release, id } => {
                self.running_job(&key).ok().filter(|(w, _)| w.release == release)?;
                let mut row = self.job_row(&key);
                if row.ran_release >= release {
                    return None;
                }
                row.ran_release = release;
                self.put_job(key.clone(), row);
                self.new_run(&key, id, Trigger::Deploy, release, None, BTreeMap::new(), None);
            }
            RunStep::Begin { key, number } => {
                let (workload, _) = self.running_job(&key).ok()?;
                let mut run = self.live_run(&key, number).filter(|r| r.phase == RunPhase::Waiting)?;
                let mut row = self.job_row(&key);
                if row.next_index > INDEX_MAX {
                    row.next_index = 0;
                }
                run.phase = RunPhase::Active;
                run.started_at = Some(self.at);
                // What waited runs what is deployed now.
                run.release = workload.release;
                run.copies = workload.copies.max(1);
                run.first_index = row.next_index;
                row.next_index += run.copies;
                self.put_job(key, row);
                self.state.put_run(run);
            }
            RunStep::Done { key, number, alloc } => {
                let mut run = self.live_run(&key, number)?;
                let index = self.ended_copy(&run, alloc, true)?;
                run.done.insert(index);
                run.exit = Some(0);
                if run.open_slots().next().is_none() {
                    self.end_run(run, RunPhase::Succeeded, None);
                } else {
                    self.state.put_run(run);
                }
            }
            RunStep::Tried { key, number, alloc, retry_at } => {
                let mut run = self.live_run(&key, number)?;
                self.ended_copy(&run, alloc, false)?;
                let status = self.state.allocs.get(&alloc)?.status.clone();
                run.failures = run.failures.saturating_add(1);
                run.exit = status.as_ref().and_then(|s| s.last_exit.as_ref()?.code);
                run.reason = status.as_ref().and_then(|s| s.reason.clone());
                run.retry_at = retry_at;
                let reason = run.reason.clone();
                match retry_at {
                    Some(_) => self.state.put_run(run),
                    None => self.end_run(run, RunPhase::Failed, reason),
                }
            }
            RunStep::End { key, number, phase, reason } => {
                let run = self.live_run(&key, number)?;
                self.end_run(run, phase, reason);
            }
        }
        Some(())
    }

    /// The slot of a copy of the run that has ended by itself, which is noted: it should no longer run.
    fn ended_copy(&mut self, run: &JobRun, alloc: AllocId, well: bool) -> Option<u32> {
        let row = self.state.allocs.get(&alloc)?;
        let fits = row.key == run.job && run.slots().contains(&row.index) && !run.done.contains(&row.index);
        if !fits || row.is_complete() != well || !row.phase().is_terminal() || !(row.run || well) {
            return None;
        }
        let index = row.index;
        self.state.change_alloc(alloc, |row| row.run = false);
        Some(index)
    }

    fn live_run(&self, key: &WorkloadKey, number: u64) -> Option<JobRun> {
        self.state.run(key, number).filter(|r| !r.phase.is_final()).map(|r| JobRun::clone(r))
    }

    /// The workload and its spec, if it is a job that is not stopped.
    fn running_job(&self, key: &WorkloadKey) -> Result<(Workload, Arc<WorkloadSpec>), Refusal> {
        let workload = self.changeable(key)?;
        let spec = self.state.release(key, workload.release).map(|r| r.spec.clone());
        match spec.filter(|s| s.kind == Kind::Job) {
            None => Err(Refusal::NotAJob(key.clone())),
            Some(_) if workload.stopped => Err(Refusal::Stopped(key.clone())),
            Some(spec) => Ok((workload, spec)),
        }
    }

    fn room_for_run(&self, key: &WorkloadKey, rules: &Runs) -> Result<(), Refusal> {
        if self.state.live_runs(key).count() as u64 >= u64::from(rules.active) + u64::from(rules.waiting) {
            return Err(Refusal::RunsFull { key: key.clone(), waiting: rules.waiting });
        }
        if self.state.indexes.live_runs.len() >= RUNS_MAX {
            return Err(Refusal::TooMany { what: "runs that wait or are active".into(), limit: RUNS_MAX as u64 });
        }
        Ok(())
    }

    fn job_row(&self, key: &WorkloadKey) -> JobRow {
        self.state.job(key).map_or_else(JobRow::default, |row| JobRow::clone(row))
    }

    fn put_job(&mut self, key: WorkloadKey, row: JobRow) {
        self.state.jobs.insert(key, Arc::new(row));
    }

    #[allow(clippy::too_many_arguments)] // each is a column of the row
    fn new_run(
        &mut self,
        key: &WorkloadKey,
        id: RunId,
        trigger: Trigger,
        release: u64,
        due: Option<&Due>,
        params: BTreeMap<String, String>,
        payload: Option<Arc<Vec<u8>>>,
    ) {
        let mut row = self.job_row(key);
        row.newest += 1;
        let number = row.newest;
        self.put_job(key.clone(), row);
        self.state.put_run(JobRun {
            id,
            job: key.clone(),
            number,
            trigger,
            scheduled_for: due.map(|d| d.at),
            local: due.map(|d| d.local.clone()),
            release,
            phase: RunPhase::Waiting,
            first_index: 0,
            copies: 0,
            done: imbl::OrdSet::new(),
            failures: 0,
            attempts: 0,
            retry_at: None,
            created_at: self.at,
            started_at: None,
            ended_at: None,
            reason: None,
            exit: None,
            params,
            payload,
        });
        let message = match (trigger, due) {
            (_, Some(due)) => format!("run {number}, due at {}", due.local),
            (Trigger::Deploy, None) => format!("run {number} of release {release}"),
            _ => format!("run {number} on request"),
        };
        self.event(EventKind::RunStarted, &key.to_string(), &message, None);
    }

    fn end_run(&mut self, mut run: JobRun, phase: RunPhase, reason: Option<Reason>) {
        run.phase = phase;
        run.ended_at = Some(self.at);
        run.payload = None;
        run.retry_at = None;
        // What an earlier try failed of does not matter any more.
        run.reason = if phase == RunPhase::Succeeded { None } else { reason.clone() };
        let (key, number) = (run.job.clone(), run.number);
        self.state.put_run(run);
        let how = match phase {
            RunPhase::Succeeded => "succeeded",
            RunPhase::Failed => "failed",
            _ => "was cancelled",
        };
        self.event(EventKind::RunEnded, &key.to_string(), &format!("run {number} {how}"), reason);
        let keep = self.state.workload(&key).and_then(|w| self.state.release(&key, w.release)).map_or(1, |r| r.spec.job_runs().keep);
        let ended: Vec<u64> = self.state.runs_of(&key).rev().filter(|r| r.phase.is_final()).map(|r| r.number).collect();
        for &old in ended.iter().skip(keep as usize) {
            self.state.remove_run(&key, old);
        }
    }

    /// Counts a copy that was placed in its run.
    pub(super) fn count_attempt(&mut self, key: &WorkloadKey, index: u32) {
        if !self.state.jobs.contains_key(key) {
            return; // most workloads are none
        }
        if let Some(run) = self.state.run_of_slot(key, index) {
            let mut run = JobRun::clone(run);
            run.attempts = run.attempts.saturating_add(1);
            self.state.put_run(run);
        }
    }

    /// Drops all that is known of a job.
    pub(super) fn forget_job(&mut self, key: &WorkloadKey) {
        self.state.jobs.remove(key);
        let numbers: Vec<u64> = self.state.runs_of(key).map(|r| r.number).collect();
        for number in numbers {
            self.state.remove_run(key, number);
        }
    }
}

/// Whether a run is given what its job asks for, and no more than may be.
pub fn check_input(rules: &Runs, params: &BTreeMap<String, String>, payload: Option<&[u8]>) -> Result<(), Refusal> {
    let refuse = |text: String| Err(Refusal::RunInput(text));
    if let Some(missing) = rules.params.iter().find(|name| !params.contains_key(*name)) {
        return refuse(format!("the job needs the parameter {missing}"));
    }
    if let Some((odd, _)) = params.iter().find(|(name, _)| !rules.params.contains(name)) {
        let odd: String = odd.chars().take(64).collect();
        return refuse(format!("the job has no parameter {odd:?}"));
    }
    if let Some((long, _)) = params.iter().find(|(_, value)| value.len() > PARAM_MAX || value.contains('\0')) {
        return refuse(format!("the parameter {long} is longer than {PARAM_MAX} bytes or holds a NUL"));
    }
    match (payload, rules.payload) {
        (None, PayloadRule::Required) => refuse("the job needs a payload".into()),
        (Some(_), PayloadRule::Forbidden) => refuse("the job takes no payload".into()),
        (Some(payload), _) if payload.len() > PAYLOAD_MAX => {
            refuse(format!("the payload has {} bytes; at most {PAYLOAD_MAX} are taken", payload.len()))
        }
        _ => Ok(()),
    }
}

fn skipped(due: &Due, why: &SkipReason) -> String {
    let why = match why {
        SkipReason::Overlap { run } => format!("run {run} is still active"),
        SkipReason::Missed => "it was missed".to_owned(),
        SkipReason::MadeUp => "it was missed; a newer one makes up for it".to_owned(),
        SkipReason::Full => "as many runs as may were waiting".to_owned(),
    };
    format!("the run due at {} is skipped: {why}", due.local)
}
