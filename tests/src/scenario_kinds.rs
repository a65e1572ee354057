//! The words of scenarios about jobs, daemons and nodes.
//!
//! ```text
//! cluster version 3                            every server understands jobs, daemons and drains
//! deploy-daemon logger [percent=20]            settings as those of a workload
//! deploy-job report [cron=0_3_*_*_*] [timezone=..] [overlap=..] [missed=..] [retries=1] [active=1] [waiting=1]
//! run report | cancel report 2
//! copies of report take 10s [exit 3]           how long its copies work, and how they end
//! cordon n1 | uncordon n1 | drain n1 [deadline=30s] [keep-daemons] | cancel-drain n1
//! leader is away | leader is back
//! runs of report are succeeded active          by number
//! n1 is draining | n1 is drained | n1 holds 3 of web | n1 moves 1 of web
//! ```

use std::collections::BTreeMap;

use anyhow::{Context, bail, ensure};
use optimus_common::RunId;
use optimus_common::spec::job::Schedule;
use optimus_core::state::{LEVEL, NodeChange, RunOrder, ServerFacts};

use super::*;

/// What of the world only these words need.
#[derive(Debug, Default)]
pub(super) struct Kinds {
    pub leader_away: bool,
    takes: BTreeMap<String, (Span, i32)>,
    began: BTreeMap<AllocId, Timestamp>,
}

impl World {
    /// A line of these words.
    pub(super) fn kinds_line(&mut self, words: &[&str]) -> anyhow::Result<()> {
        match words {
            ["cluster", "version", to] => {
                let server =
                    ServerFacts { name: "s".into(), address: String::new(), api: String::new(), version: String::new(), level: LEVEL };
                self.apply(create_cluster());
                self.apply(Command::AdmitServer { token: None, server, key_fingerprint: vec![] });
                self.answered(Command::RaiseVersion { to: to.parse()? })
            }
            ["deploy-daemon", name, settings @ ..] => {
                let (own, others): (Vec<&str>, Vec<&str>) = settings.iter().copied().partition(|s| s.starts_with("percent="));
                self.set_spec(name, &others)?;
                let spec = self.specs.get_mut(*name).context("no such workload")?;
                (spec.kind, spec.copies) = (Kind::Daemon, None);
                spec.update.percent = own.first().map(|s| s["percent=".len()..].parse()).transpose()?;
                let command = self.deploy_command(name)?;
                self.answered(command)
            }
            ["deploy-job", name, settings @ ..] => {
                let job = |s: &&str| {
                    ["cron", "timezone", "overlap", "missed", "retries", "active", "waiting"].contains(&s.split('=').next().unwrap_or(""))
                };
                let (own, others): (Vec<&str>, Vec<&str>) = settings.iter().copied().partition(job);
                self.set_spec(name, &others)?;
                let spec = self.specs.get_mut(*name).context("no such workload")?;
                let own: BTreeMap<&str, &str> = own.iter().filter_map(|s| s.split_once('=')).collect();
                let word = |text: &str| serde_json::Value::String(text.to_owned());
                spec.kind = Kind::Job;
                spec.schedule = own.get("cron").map(|line| Schedule::of(line.replace('_', " ")));
                if let Some(schedule) = &mut spec.schedule {
                    schedule.timezone = own.get("timezone").map_or("UTC", |zone| *zone).to_owned();
                    if let Some(text) = own.get("overlap") {
                        schedule.overlap = serde_json::from_value(word(text))?;
                    }
                    if let Some(text) = own.get("missed") {
                        schedule.missed = serde_json::from_value(word(text))?;
                    }
                }
                let mut runs = Runs::of(spec.schedule.as_ref());
                for (key, field) in [("retries", &mut runs.retries), ("active", &mut runs.active), ("waiting", &mut runs.waiting)] {
                    if let Some(number) = own.get(key) {
                        *field = number.parse()?;
                    }
                }
                spec.runs = Some(runs);
                let command = self.deploy_command(name)?;
                self.answered(command)
            }
            ["run", name] => {
                let (key, id) = (key(name)?, RunId(self.next_id()));
                self.answered(Command::StartRun(RunOrder { key, id, params: BTreeMap::new(), payload: None }))
            }
            ["cancel", name, number] => self.answered(Command::CancelRun { key: key(name)?, number: number.parse()? }),
            ["copies", "of", name, "take", span] => self.takes(name, span, "0"),
            ["copies", "of", name, "take", span, "exit", code] => self.takes(name, span, code),
            ["cordon", node] => self.change(node, NodeChange::Cordon),
            ["uncordon", node] => self.change(node, NodeChange::Uncordon),
            ["cancel-drain", node] => self.change(node, NodeChange::CancelDrain),
            ["drain", node, settings @ ..] => {
                let deadline = settings.iter().find_map(|s| s.strip_prefix("deadline=")).map(str::parse::<Span>).transpose()?;
                let (deadline, keep_daemons) = (deadline.map(|after| self.now + after), settings.contains(&"keep-daemons"));
                self.change(node, NodeChange::Drain { deadline, keep_daemons })
            }
            ["leader", "is", "away"] => {
                self.kinds.leader_away = true;
                Ok(())
            }
            ["leader", "is", "back"] => {
                self.kinds.leader_away = false;
                Ok(())
            }
            ["runs", "of", name, "are", wanted @ ..] => {
                let found: Vec<String> = self.state.runs_of(&key(name)?).map(|run| format!("{:?}", run.phase).to_lowercase()).collect();
                same(&found.join(" "), &wanted.join(" "))
            }
            [node, "holds", count, "of", name] => {
                let of = key(name)?;
                let runs = self.state.allocs_on(self.node(node)?).filter(|a| a.key == of && a.run && !a.phase().is_terminal()).count();
                same(&runs.to_string(), count)
            }
            [node, "moves", count, "of", name] => {
                let of = key(name)?;
                let flagged = self.state.allocs_on(self.node(node)?).filter(|a| a.key == of && a.run && a.migrate).count();
                same(&flagged.to_string(), count)
            }
            _ => bail!("no such line"),
        }
    }

    fn takes(&mut self, name: &str, span: &str, code: &str) -> anyhow::Result<()> {
        self.kinds.takes.insert(name.to_owned(), (span.parse()?, code.parse()?));
        Ok(())
    }

    fn change(&mut self, node: &str, change: NodeChange) -> anyhow::Result<()> {
        let node = self.node(node)?;
        self.answered(Command::ChangeNode { node, change })
    }

    /// `draining` or `drained`; none for another word.
    pub(super) fn drain_state(&self, node: &str, wanted: &str) -> Option<anyhow::Result<()>> {
        let row = self.state.nodes.get(self.nodes.get(node)?)?;
        let is = match &row.drain {
            Some(drain) if drain.done_at.is_some() => "drained",
            Some(_) => "draining",
            None if row.cordoned => "cordoned",
            None => "open",
        };
        Some(same(is, wanted))
    }

    /// What the agent of a job's copy reports: it works for a while and ends.
    pub(super) fn job_ends(&mut self, alloc: &Alloc) -> Option<(Phase, Reason, Exit)> {
        if self.state.release(&alloc.key, alloc.release)?.spec.kind != Kind::Job || !alloc.run || alloc.phase().is_terminal() {
            return None;
        }
        let began = *self.kinds.began.entry(alloc.id).or_insert(self.now);
        let (takes, code) = self.kinds.takes.get(alloc.key.workload.as_str()).copied().unwrap_or((Span::secs(5), 0));
        if self.now < began + takes {
            return None;
        }
        let exit = Exit { code: Some(code), signal: None, oom: None, at: self.now, ran_for: takes };
        Some((if code == 0 { Phase::Stopped } else { Phase::Failed }, Reason::Exited { exit: exit.clone() }, exit))
    }

    /// Proposes what the leader wants beside its plan. True: something of it took effect.
    pub(super) fn other_commands(&mut self, commands: &[Command]) -> anyhow::Result<bool> {
        let mut acted = false;
        for command in commands {
            let answer = self.apply(command.clone());
            ensure!(!matches!(answer, Applied::Refused(_)), "the leader's own command was refused: {command:?} {answer:?}");
            acted |= matches!(answer, Applied::Done { .. });
            let mut again = self.state.clone();
            let index = again.index;
            again.apply(index, Proposal { at: self.now, request: None, command: command.clone() });
            ensure!(again.digest() == self.state.digest(), "applied twice it is not what it is applied once: {command:?}");
        }
        Ok(acted)
    }
}
